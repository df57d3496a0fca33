"""What people and programs see of a study.

terminal.py   progress and result in the terminal
documents.py  the same as plain JSON data
"""

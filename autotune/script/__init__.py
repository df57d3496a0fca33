"""What runs inside the user's own training script: `autotune.report_step` and `autotune.TrainerCallback`.

session.py    a trial as the script's process sees it: what to measure, when it is enough, what went wrong
callback.py   the callback of transformers' Trainer

Importing `autotune` where no trial runs the script does nothing and loads nothing.
"""

"""One file per foreign format: a `TrialConfig` in that format's words. Engines and export both call it.

deepspeed_json.py  DeepSpeed's JSON
templates/         the texts of the best folder
"""

"""One file per foreign format: a `TrialConfig` in that format's words. Engines and export both call it.

targets.py          who can run a config afterwards, and what each leaves to the script
deepspeed_json.py   DeepSpeed's JSON, explicit and with the Trainer's `auto`
training_args.py    transformers' TrainingArguments
accelerate_yaml.py  the config file of `accelerate launch`
peft_json.py        PEFT's adapter_config.json
bitsandbytes_json.py  transformers' BitsAndBytesConfig
foreign.py          how a library is asked about a file
templates/          the texts of the best folder
"""

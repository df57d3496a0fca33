"""Supervised fine-tuning on transformers' Trainer, as TRL's SFTTrainer does it: conversations in a chat template, loss
on the answers alone, batches padded to their longest conversation.

    torchrun --nproc-per-node 2 sft.py training_args.yaml --model qwen3-tiny --output-dir sft-output

It stands for a script of your own. What Autotune needs of it is the one line that has its name.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

ALPHABET = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Questions with answers of very different lengths: numbers to be spelled."""
    generator = random.Random(0)
    found = []
    for _ in range(count):
        digits = [generator.randrange(10) for _ in range(generator.randint(2, 16))]
        question, answer = "".join(map(str, digits)), " ".join(ALPHABET[digit] for digit in digits)
        found.append([{"role": "user", "content": f"Spell {question}."}, {"role": "assistant", "content": answer}])
    return found


def tokenized(messages: list[dict[str, str]], tokenizer: ByT5Tokenizer, max_length: int) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels that leave out all but the answer."""
    prompt = tokenizer(f"<user>{messages[0]['content']}\n<assistant>", add_special_tokens=False)["input_ids"]
    answer = tokenizer(messages[1]["content"])["input_ids"]
    ids = (prompt + answer)[:max_length]
    labels = ([-100] * len(prompt) + answer)[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("training_arguments", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--pad-to-multiple-of", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=1024)
    parser.add_argument("--output-dir", required=True)
    options = parser.parse_args()
    (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(str(options.training_arguments))
    arguments.output_dir, arguments.report_to, arguments.disable_tqdm = options.output_dir, [], True
    tokenizer = ByT5Tokenizer()
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(options.model), dtype=torch.float32, attn_implementation=options.attention
    )
    found = conversations(options.conversations)
    rows: list[dict[str, Any]] = [tokenized(messages, tokenizer, options.max_length) for messages in found]
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=options.pad_to_multiple_of)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    import autotune; trainer.add_callback(autotune.TrainerCallback())  # fmt: skip # noqa: E702, I001 the one line
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

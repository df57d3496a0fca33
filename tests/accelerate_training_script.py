"""A training script of a user: a loop on accelerate's `Accelerator` whose ranks share sequences.

    accelerate launch --config_file accelerate.yaml accelerate_training_script.py report.json

It trains the model of the parity tests, on their batches, and writes each step's loss and gradient norm. Of the files
it knows nothing; what it does besides is what the best folder's README leaves to a script.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DummyOptim
from torch import distributed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

from autotune.engines.batches import sequence
from autotune.engines.deepspeed import write_partitioned_weights
from autotune.modeling.build import huggingface_config
from tests.engines.parity import CPU, SEQUENCE_LENGTH, STEPS, VOCAB, WORKLOAD, tiny
from tests.hf_training_script import adapt_deepspeed_to_cpu


def examples() -> list[dict[str, torch.Tensor]]:
    """All sequences of all steps, in order, and of one more: near its end DeepSpeed's loader cuts a step short."""
    found = []
    for step in range(STEPS + 1):
        for index in range(WORKLOAD.global_batch_size):
            ids = torch.from_numpy(sequence(WORKLOAD.seed, step, index, SEQUENCE_LENGTH, VOCAB))
            found.append({"input_ids": ids, "labels": ids, "position_ids": torch.arange(SEQUENCE_LENGTH)})
    return found


def main() -> None:
    adapt_deepspeed_to_cpu()
    # As the Trainer does where it is told `use_cpu`, which the launcher does not tell a script on DeepSpeed: without a
    # GPU accelerate then counts one process, and every rank has all batches.
    PartialState(cpu=True)
    micro_batch_size = 2
    accumulation = WORKLOAD.global_batch_size // micro_batch_size  # all ranks are in one group
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    model = AutoModelForCausalLM.from_config(huggingface_config(tiny()), attn_implementation="sdpa").train()
    write_partitioned_weights(model, CPU, WORKLOAD.seed)
    loader: Any = DataLoader(examples(), batch_size=micro_batch_size)  # type: ignore[arg-type]  # a list will do
    model, _, loader = accelerator.prepare(model, DummyOptim(model.parameters()), loader)
    losses, norms = [], []
    for batch in loader:
        # Where batches go to a GPU they become contiguous by that; on a CPU DeepSpeed's loader gives views.
        inputs = {name: tensor.to(accelerator.device).contiguous() for name, tensor in batch.items()}
        with accelerator.accumulate(model):
            loss = deepspeed_sp_compute_loss(accelerator, model, inputs, False, accelerator.parallelism_config)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(float(model.get_global_grad_norm()))
        if len(norms) == STEPS:
            break
    means = [sum(losses[i : i + accumulation]) / accumulation for i in range(0, len(losses), accumulation)]
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps({"losses": means, "norms": norms}))
    distributed.barrier()
    os._exit(0)  # as hf_training_script.py does, and why


if __name__ == "__main__":
    main()

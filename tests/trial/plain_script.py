"""A training script of a user, in plain PyTorch: a stack of matrices, its settings on the command line.

python plain_script.py MODE WIDTH ROWS ACCUMULATION
"""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import autotune

mode, width, rows, accumulation = sys.argv[1], *map(int, sys.argv[2:5])
if mode == "silent":
    sys.exit(0)
if mode == "build":
    raise ValueError("no such layer")
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
optimizer = torch.optim.AdamW(model.parameters())
if mode == "offspring":
    subprocess.Popen(["sleep", "300"], start_new_session=True)
for step in range(1000):
    for micro_step in range(accumulation):
        loss = model(torch.randn(rows, width)).square().mean()
        loss.backward()
        if mode == "crash" and step == 1:
            raise RuntimeError("the data is broken")
        if mode == "hang" and step == 1:
            time.sleep(300)
        if mode == "caught":
            try:
                torch.empty(1 << 40)
            except RuntimeError as error:
                sys.stderr.write(f"{error}\n")
                sys.exit(1)
        if micro_step < accumulation - 1 and mode != "whole":
            autotune.report_step(loss=loss, accumulating=True)
    optimizer.step()
    optimizer.zero_grad()
    autotune.report_step(loss=loss * float("nan" if mode == "nan" and step == 1 else 1), tokens=7 * rows)

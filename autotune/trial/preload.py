"""What the fork server imports, once, so that a rank starts in milliseconds.

Ranks are forked from a process that has imported this module and does nothing else. It must therefore make no tensor,
start no thread and leave CUDA alone: a forked process cannot use a CUDA context, a thread pool or a lock that its
parent had. The pool sets the environment that keeps the libraries quiet (`autotune.trial.pool.trial_environment`), and
asks a forked child whether it worked before it trusts this.
"""

import importlib
import sys

MODULES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "accelerate",
    "deepspeed",
    "autotune.engines.batches",
    "autotune.engines.pytorch",
    "autotune.engines.deepspeed",
    "autotune.trial.worker",
)
"""transformers imports its parts lazily, so the modules that building a model needs are named."""

# transformers imports torchao wherever it is installed, which asks for GPUs. A rank that trains in fp8 does it itself.
sys.modules["torchao"] = None  # type: ignore[assignment]  # how Python is told that there is no such module
for _module in MODULES:
    importlib.import_module(_module)
del sys.modules["torchao"]

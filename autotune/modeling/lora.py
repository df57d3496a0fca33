"""LoRA: adapters in a model, by the PEFT library, in place and under transformers' own names of the modules.

In place (`inject_adapter_in_model`, which is what transformers' `add_adapter` calls), not wrapped in a `PeftModel`: the
model stays the `PreTrainedModel` that sharding, stages and the Trainer know. The Trainer shards a `PeftModel` by FSDP2
in one piece, all layers gathered at once (`autotune.formats.targets`).
"""

from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from autotune.formats.peft_json import to_adapter_config
from autotune.spec.config import TrialConfig


def add_adapters(model: PreTrainedModel, config: TrialConfig) -> None:
    """Put the adapters of `config` into `model`, in place; they alone require gradients afterwards.

    Where the model is on meta so are the adapters, and `materialize` gives both their values. Where it is not, under
    DeepSpeed's stage 3, they have the device and the dtype of the matrix beside them.

    Args:
        model: whole; its lm head gets no adapter.
        config: of a method with adapters.
    """
    adapters = LoraConfig.from_peft_type(**to_adapter_config(config))
    if next(model.parameters()).is_meta:
        # Where tensors are fake, one on meta would be fake as well, and could not be replaced.
        with unset_fake_temporarily():
            inject_adapter_in_model(adapters, model, low_cpu_mem_usage=True)
    else:
        inject_adapter_in_model(adapters, model)

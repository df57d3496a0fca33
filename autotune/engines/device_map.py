"""`SpreadEngine`: LoRA and QLoRA in one process whose GPUs hold some layers each and work one after another."""

import torch
from accelerate.utils import convert_outputs_to_fp32

from autotune.engines.pytorch import PyTorchEngine
from autotune.modeling.build import (
    COMPUTE_DTYPES,
    apply_activation_checkpointing,
    build_model,
    materialize,
    write_initial_weights,
)
from autotune.modeling.device_map import balanced_map, devices_of, spread
from autotune.spec.request import TrialRequest


class SpreadEngine(PyTorchEngine):
    """The whole trial: its only rank. Inputs are given to the first GPU, and the loss is there."""

    def _lay_out(self, request: TrialRequest, device: torch.device) -> torch.nn.Module:
        """In the order of `from_pretrained`, `add_adapter` and the Trainer: hooks, which adapters so have none of, then
        adapters, and autocast around all of it, so that logits are cast to fp32 where the hooks have brought them.
        """
        from autotune.modeling.lora import add_adapters  # PEFT and bitsandbytes take seconds to import

        config, seed = request.config, request.workload.seed
        model = build_model(request.model, config.attention)
        if config.method == "qlora":
            from autotune.modeling.quantized import replace_linear

            replace_linear(model, config)
        apply_activation_checkpointing(model, config)
        devices, numbers = devices_of(config, device), balanced_map(request.model, config)
        placed = {name: devices[number] for name, number in numbers.items()}
        frozen = COMPUTE_DTYPES[config.precision]
        materialize(model, device, frozen, seed, placed=placed)
        spread(model, placed, devices[min(numbers.values())])
        add_adapters(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        write_initial_weights(model, device, seed, frozen_too=False)
        if config.precision != "fp32":
            model.forward = convert_outputs_to_fp32(torch.autocast(device.type, frozen)(model.forward))
        whole: torch.nn.Module = model
        return whole

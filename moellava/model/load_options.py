"""How a model is built or opened, whatever its parts: `LoadOptions`, `default_device`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

# True: a mixture by default rules; a mapping: fields of `LlamaMoeConfig`; False: dense.
MoeChoice: TypeAlias = Mapping[str, object] | bool
# As transformers' `from_pretrained` takes it.
DeviceMap: TypeAlias = str | int | torch.device | dict[str, int | str | torch.device]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What `load_pretrained_model` was told about the weights."""

    dtype: torch.dtype | None = None  # of all but the routers; None: as stored
    attn_implementation: str | None = None  # None: transformers chooses
    quantization_config: QuantizationConfigMixin | None = None
    device_map: DeviceMap | None = None
    moe_config: MoeChoice = True
    seed: int = 0  # of the weights that no file holds: the projector and the routers

    @property
    def keywords(self) -> dict[str, object]:
        """For transformers' `from_pretrained`: those that were given, except for the dtype."""
        given = {
            "attn_implementation": self.attn_implementation,
            "quantization_config": self.quantization_config,
            "device_map": self.device_map,
        }
        return {name: value for name, value in given.items() if value is not None}


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"

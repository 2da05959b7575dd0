"""PEFT's adapters on rounded weights: `accept_rounded`."""

from typing import TYPE_CHECKING, Any

from torch import nn

from moellava.model.quantization.modules import QuantizedLinear, quantized_weights

if TYPE_CHECKING:
    from peft import PeftConfig

_NO_MERGE = (
    "An adapter cannot be merged into rounded weights. Merge it into ordinary ones: "
    "model.dequantize(), or a model that was opened without load_in_8bit and load_in_4bit."
)


def accept_rounded(config: "PeftConfig", model: nn.Module) -> "PeftConfig":
    """`config`, made to put LoRA on `QuantizedLinear` if the model has rounded weights.

    Raises:
        ValueError: for another kind of adapter, or one of fused experts, on such a model.
    """
    if next(quantized_weights(model), None) is None:
        return config
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"The model's weights are rounded, and adapters on them are LoRA, not "
            f"{config.peft_type}. Open the model without load_in_8bit and load_in_4bit."
        )
    if config.target_parameters:
        raise ValueError(
            f"The adapter is of fused experts ({', '.join(config.target_parameters)}), whose "
            "weights are rounded here. PEFT adds such an adapter to the ordinary weight: open the "
            "model without load_in_8bit and load_in_4bit."
        )

    class RoundedLora(Linear):
        """PEFT's LoRA, which would merge into a weight that it cannot write to."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(_NO_MERGE)

    config._register_custom_module({QuantizedLinear: RoundedLora})
    return config

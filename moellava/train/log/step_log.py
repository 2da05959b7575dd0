"""What a step is logged with beside its loss: tokens per second, memory, what the routers did.

`StepLog` is what counts.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MultimodalMoeCausalLMOutputWithPast

from moellava.memory import peak_memory_mib
from moellava.model.language_model.configuration_llama_moe import is_mixture_config
from moellava.train.log.router_load import Load, RouterLoad


class StepLog:
    """Counts batches on their device and waits for nothing until `flush`.

    Args:
        config: of the model; a mixture's routers are counted.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        text_config = config.text_config
        self.image_token_id = config.image_token_id
        self.is_mixture = is_mixture_config(text_config)
        if self.is_mixture:
            self.router_load = RouterLoad(
                text_config.num_experts_per_tok, text_config.moe_layer_indices
            )
        self._reset()

    def _reset(self) -> None:
        self._num_tokens: Tensor | int = 0
        self._aux_losses: list[Tensor] = []
        self._since = time.perf_counter()

    def add(
        self, inputs: Mapping[str, Tensor], outputs: MultimodalMoeCausalLMOutputWithPast
    ) -> None:
        """Count one batch: what the model was given and what it returned."""
        mask = inputs.get("attention_mask")
        self._num_tokens = self._num_tokens + (
            inputs["input_ids"].numel() if mask is None else mask.sum()
        )
        if self.is_mixture:
            assert outputs.router_logits is not None  # the trainer asks for them
            assert outputs.aux_loss is not None
            is_image = inputs["input_ids"] == self.image_token_id
            self.router_load.add(outputs.router_logits, is_image, mask)
            self._aux_losses.append(outputs.aux_loss.detach())

    def leave_out(self, seconds: float) -> None:
        """Time in which nothing was trained."""
        self._since += seconds

    def flush(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], Load | None]:
        """The numbers since the last call, over all processes, and begin anew.

        Args:
            reduce: sums a tensor over the processes.

        Returns:
            `tokens_per_second`, `memory_mib` and, of a mixture, `aux_loss`; and what
            `RouterLoad.flush` gives, None without a mixture.
        """
        tokens = torch.as_tensor(self._num_tokens, dtype=torch.float32, device=device)
        num_tokens, num_processes = reduce(torch.stack([tokens, torch.ones_like(tokens)])).tolist()
        numbers = {"tokens_per_second": num_tokens / (time.perf_counter() - self._since)}
        if self._aux_losses:
            numbers["aux_loss"] = (
                float(reduce(torch.stack(self._aux_losses).mean())) / num_processes
            )
        load = self.router_load.flush(reduce) if self.is_mixture else None
        self._reset()
        return {**numbers, "memory_mib": _peak_mib(device)}, load


def _peak_mib(device: torch.device) -> float:
    """Peak memory so far: of the accelerator's tensors, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_memory_mib()

"""Our router's losses in TRL's trainers, which compute one of their own: `use_router_loss`."""

import functools
from typing import Any, Protocol

from torch import Tensor, nn

from moellava.model.language_model.moe import router_penalty
from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration


class TrainerOfModel(Protocol):
    """A trainer of TRL, as far as it is looked at."""

    @property
    def model(self) -> nn.Module | None: ...


def use_router_loss(trainer: TrainerOfModel) -> None:
    """Let TRL's SFT, DPO or GRPO trainer train the routers as the model's own `forward` does.

    TRL 1.16 takes the logits past our `forward` and applies transformers'
    `load_balancing_loss_func` to them: about k times ours for the same routing, its shares pooled
    over all layers, so that layers which lean opposite ways cancel out, and without
    `router_z_loss_coef`. After this call its `aux_loss` is our penalty over
    `router_aux_loss_coef`, which TRL multiplies again.

    Call it between the trainer's construction and `trainer.train()`.

    Raises:
        ValueError: if the trainer has no model of ours that TRL has prepared, or the model's
            `router_aux_loss_coef` is 0, with which TRL adds nothing.
    """
    kind, trained = MoeLlavaForConditionalGeneration, trainer.model
    modules = () if trained is None else trained.modules()
    model = next((one for one in modules if isinstance(one, kind)), None)
    if model is None or "forward" not in vars(model):
        raise ValueError(
            "use_router_loss takes a trainer of TRL that was made for a moellava model, but "
            f"{type(trainer).__name__} is none. transformers' own Trainer needs nothing."
        )
    config = model.config.text_config
    if not getattr(config, "router_aux_loss_coef", 0):
        raise ValueError(
            "router_aux_loss_coef is 0, so TRL adds no router loss. Set it in the model's "
            "text_config before the trainer is made, or leave use_router_loss out."
        )
    fused = model.forward

    @functools.wraps(fused)  # `generate` looks for names of arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return fused(*args, **kwargs)
        seen: list[tuple[Tensor, ...] | None] = []
        hook = model.model.register_forward_hook(
            lambda _module, _given, outputs: seen.append(outputs.router_logits)
        )
        try:
            outputs = fused(*args, **kwargs)
        finally:
            hook.remove()
        [router_logits] = seen
        if outputs.aux_loss is not None and router_logits:
            penalty = router_penalty(config, router_logits, kwargs.get("attention_mask"))
            outputs.aux_loss = penalty / config.router_aux_loss_coef
        return outputs

    vars(model)["forward"] = forward

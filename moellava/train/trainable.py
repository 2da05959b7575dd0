"""Which weights of a model learn: `set_trainable`, `tower_weights`."""

from collections.abc import Collection

import torch
from torch import nn

from moellava.messages import unknown_name
from moellava.model.modeling_moellava import TOWER_PREFIX, MoeLlavaForConditionalGeneration
from moellava.model.quantization import require_ordinary
from moellava.train.parts import PARTS, is_of, weight_names

# Parts whose weights may be in 8 or 4 bits.
_OF_LANGUAGE_MODEL = {"language_model", "attention", "mlp", "experts", "meta_expert"}


def set_trainable(
    model: MoeLlavaForConditionalGeneration,
    parts: Collection[str],
    *,
    tower_blocks: int | None = None,
) -> int:
    """Let the named parts learn and freeze all else.

    Args:
        parts: of `moellava.train.parts.PARTS`.
        tower_blocks: of the vision tower, only the last so many blocks among those that run.

    Returns:
        How many parameters learn.

    Raises:
        ValueError: for a part that is unknown, missing in the model, or frozen by its config; for
            `tower_blocks` that the tower does not have; for weights in 8 or 4 bits.
    """
    require_parts(model, parts, "trainable")
    if set(parts) & _OF_LANGUAGE_MODEL:
        require_ordinary(model, f"trainable: {list(parts)} without lora")
    if tower_blocks is not None and "vision_tower" not in parts:
        raise ValueError(
            f"tower_blocks is {tower_blocks}, but trainable does not name 'vision_tower': it is "
            f"{list(parts)}. Add it, or leave tower_blocks out."
        )
    tower = tower_weights(model, tower_blocks) if "vision_tower" in parts else set()
    frozen_router = has_frozen_router(model)
    for name, parameter in model.named_parameters():
        learns = any(is_of(name, part) for part in parts)
        if is_of(name, "vision_tower"):
            learns = name in tower
        parameter.requires_grad_(learns and not (frozen_router and is_of(name, "router")))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def require_parts(
    model: MoeLlavaForConditionalGeneration, parts: Collection[str], where: str
) -> None:
    """Raise `ValueError` for a part that is unknown, missing in the model, or a frozen router.

    Args:
        where: the setting that names the parts, for the message.
    """
    names = weight_names(model)
    present = [part for part in PARTS if any(is_of(name, part) for name in names)]
    for part in parts:
        if part not in PARTS:
            raise unknown_name(f"part in {where}:", part, PARTS)
        if part not in present:
            raise ValueError(
                f"{where} names {part!r}, but the model has no such weights. It has: "
                f"{', '.join(present)}."
            )
    if "router" in parts and has_frozen_router(model):
        raise ValueError(
            f"{where} names 'router', but moe.config.router_frozen is true. Drop one of them."
        )


def has_frozen_router(model: MoeLlavaForConditionalGeneration) -> bool:
    """Whether the config keeps the routers as they are."""
    return bool(getattr(model.config.text_config, "router_frozen", False))


def tower_weights(
    model: MoeLlavaForConditionalGeneration, last_blocks: int | None = None
) -> set[str]:
    """Names of the tower's weights that can learn: those that patch tokens depend on.

    Blocks after the selected layer do not run, and DDP would wait for their gradients.

    Args:
        last_blocks: only those of the last so many blocks that run; what stands before and after
            the blocks is left out.

    Raises:
        ValueError: if the tower has fewer, or is not made of blocks.
    """
    tower = model.model.vision_tower
    running = _with_gradient(tower, model.config.vision_config.image_hw)
    if last_blocks is not None:
        blocks = _running_blocks(tower, running)
        if last_blocks > len(blocks):
            raise ValueError(
                f"tower_blocks is {last_blocks}, but {len(blocks)} blocks of the tower run up to "
                f"the selected layer. Choose 1 to {len(blocks)}, or leave tower_blocks out to "
                "train the whole tower."
            )
        chosen = tuple(f"{block}." for block in blocks[-last_blocks:])
        running = {name for name in running if name.startswith(chosen)}
    return {f"{TOWER_PREFIX}{name}" for name in running}


def _with_gradient(tower: nn.Module, image_hw: tuple[int, int]) -> set[str]:
    learned = [parameter.requires_grad for parameter in tower.parameters()]
    first = next(tower.parameters())
    tower.requires_grad_(True)
    with torch.enable_grad():
        pixels = torch.zeros(1, 3, *image_hw, dtype=first.dtype, device=first.device)
        torch.autograd.backward(tower(pixels).patch_tokens.float().sum())
    found = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    tower.zero_grad(set_to_none=True)
    for parameter, learns in zip(tower.parameters(), learned, strict=True):
        parameter.requires_grad_(learns)
    return found


def _running_blocks(tower: nn.Module, running: Collection[str]) -> list[str]:
    """Names of the blocks with running weights, in the list that has most of those weights."""
    sizes = {name: parameter.numel() for name, parameter in tower.named_parameters()}

    def num_running(prefix: str) -> int:
        return sum(sizes[name] for name in running if name.startswith(f"{prefix}."))

    lists = [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    longest = max(lists, key=num_running, default=None)
    if longest is None or 2 * num_running(longest) < sum(sizes[name] for name in running):
        raise ValueError(
            f"tower_blocks counts the blocks of a tower, but {type(tower).__name__} here has no "
            "list of blocks with most of its weights. Leave tower_blocks out to train it whole."
        )
    names = [f"{longest}.{name}" for name, _ in tower.get_submodule(longest).named_children()]
    return [name for name in names if num_running(name)]

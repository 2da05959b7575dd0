"""open_clip's image towers, built from their config, and their positions at another size."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moellava.encoders.open_clip.configuration import BiomedClipVisionConfig
from moellava.messages import first_names
from moellava.storage.weights import read_weights

OpenClipModule = Any  # a module of open_clip or timm, which are not typed


class _NoInitOnMeta(TorchFunctionMode):
    """Skips in-place operations on tensors without storage: building is mostly initialisation."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__")
        if is_in_place and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_visual(config: BiomedClipVisionConfig) -> OpenClipModule:
    """open_clip's image tower for a config, with fresh weights, at the config's image size.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip or timm do not know the architecture.
    """
    try:
        from open_clip.model import _build_vision_tower
    except ImportError as error:
        raise ImportError(
            "A BiomedCLIP tower is open_clip's: pip install open_clip_torch (3.3 or newer; it "
            "brings timm)."
        ) from error
    assert config.vision_cfg is not None
    vision_cfg = copy.deepcopy(config.vision_cfg) | {
        "timm_model_pretrained": False
    }  # never a download
    name = vision_cfg.get("timm_model_name")
    if name and re.search(r"[:/\\]", str(name)):  # timm would ask the hub, or read any folder
        raise ValueError(
            f"timm_model_name is {name!r}; expected the name of an architecture, such as "
            "'vit_base_patch16_224'."
        )
    is_timm = bool(name)
    height, width = config.image_hw
    if not is_timm:
        vision_cfg["image_size"] = height if height == width else (height, width)
    if isinstance(vision_cfg.get("layers"), (list, tuple)) and height != width:
        raise ValueError(
            f"image_size is {config.image_size}, but a ModifiedResNet's attention pool only takes "
            "squares."
        )
    try:
        with _NoInitOnMeta():
            visual = _build_vision_tower(config.embed_dim, vision_cfg, config.quick_gelu)
    except Exception as error:  # whatever the architecture's own code makes of these settings
        raise ValueError(
            f"open_clip cannot build the image tower {config.vision_cfg}: {error}"
        ) from error
    if is_timm and config.image_hw != config.trained_hw:
        visual.set_input_size(config.image_hw)
    return visual


def interpolate_positions(visual: OpenClipModule, config: BiomedClipVisionConfig) -> None:
    """Resize the positions of open_clip's own towers, in place, with open_clip's own function."""
    from open_clip.model import resize_pos_embed

    with torch.device("meta"):
        target = build_visual(config)
    has_attention_pool = hasattr(visual, "attnpool")  # ModifiedResNet
    owner = visual.attnpool if has_attention_pool else visual
    side = config.image_hw[0] // 32
    grid_size = (side, side) if has_attention_pool else target.grid_size
    state = {"visual.positional_embedding": owner.positional_embedding.data}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid_size)))
    requires_grad = owner.positional_embedding.requires_grad
    owner.positional_embedding = nn.Parameter(
        state["visual.positional_embedding"], requires_grad=requires_grad
    )
    for name in ("image_size", "grid_size"):
        if hasattr(target, name):
            setattr(visual, name, getattr(target, name))


def fill_computed_buffers(module: nn.Module) -> bool:
    """Compute the buffers of a meta module that no checkpoint holds (Swin's indices, EVA's tables).

    Weights have to be in place. False if timm offers no way to compute one of them.
    """
    for child in module.modules():
        names = [
            name
            for name, buffer in child.named_buffers(recurse=False)
            if buffer.device.type == "meta"
        ]
        for name in names:
            empty = torch.empty_like(child.get_buffer(name), device="cpu")
            child.register_buffer(name, empty, persistent=False)
        init_buffers: Callable[[], None] | None = getattr(
            child, "init_non_persistent_buffers", None
        )
        if names:
            if init_buffers is None:
                return False
            init_buffers()
    return True


def read_tower(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of one tower of a checkpoint, without the prefix of their names."""
    state = read_weights(path, (prefix,))
    if not state:
        others = sorted({key.split(".")[0] for key in read_weights(path)})
        raise ValueError(
            f"{path} has no tensor of an image tower (names that start with {prefix!r}). Its names "
            f"start with {first_names(others)}: a text-only checkpoint, or not an open_clip one."
        )
    return {key.removeprefix(prefix): value for key, value in state.items()}

"""What open_clip's towers say themselves: `encode_image`, and hooks in their own forward."""

import torch


def random_pixels(encoder, batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, 3, *encoder.config.image_hw, generator=torch.Generator().manual_seed(1)
    )


def blocks_of(visual) -> list:
    """The modules whose outputs are the hidden states, named by hand: what the oracle knows."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        if hasattr(visual, "transformer"):
            return list(visual.transformer.resblocks)
        return [visual.avgpool, visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if hasattr(trunk, "blocks"):
        return list(trunk.blocks)
    if hasattr(trunk, "stages"):
        return list(trunk.stages)
    if hasattr(trunk, "layer1"):
        return [trunk.act1, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return list(trunk.layers)


@torch.no_grad()
def encode_image(model, pixels: torch.Tensor) -> torch.Tensor:
    pooled = model.visual(pixels)
    return pooled[0] if isinstance(pooled, tuple) else pooled  # CoCa's tower also returns tokens


@torch.no_grad()
def hooked(model, pixels: torch.Tensor, index: int) -> torch.Tensor:
    """What block `index` returned while open_clip's own encode_image ran."""
    seen = []
    hook = blocks_of(model.visual)[index].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    model.visual(pixels)
    hook.remove()
    return seen[0]


def flat(name: str, hidden: torch.Tensor, num_patches: int) -> torch.Tensor:
    """A block's output as patch tokens: the last N tokens, or the map row by row."""
    if name == "timm_swin":
        return hidden.flatten(1, 2)  # (B, H, W, C)
    return hidden.flatten(2).mT if hidden.ndim == 4 else hidden[:, -num_patches:]

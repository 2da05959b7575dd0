"""Small open_clip models of many kinds, written as open_clip itself would save them."""

import json
from pathlib import Path

import torch

_TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
_VIT = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}


def timm_trunk(name: str, **settings) -> dict:
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 224} | settings


# name: open_clip's vision_cfg. Sizes are as small as the architecture allows.
ARCHITECTURES: dict[str, dict] = {
    "biomedclip": timm_trunk("vit_tiny_patch16_224", timm_pool="", timm_proj="linear"),
    "timm_pre_norm": timm_trunk("vit_xsmall_patch16_clip_224", timm_pool=""),
    "timm_small": timm_trunk("test_vit", timm_pool="", image_size=160),
    "timm_register_no_class": timm_trunk(
        "test_vit2", timm_pool="", timm_proj="mlp", image_size=160
    ),
    "timm_class_and_register": timm_trunk("test_vit4", timm_pool="", image_size=160),
    "timm_attention_pool": timm_trunk(
        "test_vit3", timm_pool="map", timm_proj="none", image_size=160
    ),
    "timm_eva": timm_trunk("eva02_tiny_patch14_224", timm_pool="", timm_proj="mlp"),
    "timm_convnext": timm_trunk("test_convnext", timm_pool="", timm_proj="linear", image_size=160),
    "timm_resnet": timm_trunk("test_resnet", timm_pool="avg", timm_proj="linear", image_size=160),
    "timm_resnet_attention_pool": timm_trunk("resnet18", timm_pool="rot_attn", timm_proj=""),
    "timm_swin": timm_trunk("swin_tiny_patch4_window7_224", timm_pool=""),
    "vit": _VIT,
    "vit_without_pre_norm": _VIT | {"no_ln_pre": True},
    "vit_layer_scale_average": _VIT
    | {"ls_init_value": 0.1, "pool_type": "avg", "final_ln_after_pool": True},
    "vit_coca": _VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "modified_resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
}


def write_open_clip(
    folder: Path, vision_cfg: dict, *, embed_dim: int = 32, quick_gelu: bool = False
) -> Path:
    """An open_clip repo with random weights in every tensor, the text tower a tiny transformer."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {
        "embed_dim": embed_dim,
        "vision_cfg": vision_cfg,
        "text_cfg": _TEXT,
        "quick_gelu": quick_gelu,
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(model_cfg)))
    for name, tensor in model.state_dict().items():
        if name.startswith("visual.") and tensor.is_floating_point() and "running_var" not in name:
            # Zero-initialised heads and unit norms would hide a wrong order of operations.
            tensor.add_(torch.randn_like(tensor) * 0.02)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder

"""Medical vision-language models: an image encoder, a projector and a mixture-of-experts language model.

The names below load their modules on first use, so that `import moellava` is quick. The classes are
registered with transformers' Auto classes all the same: see `moellava.registration`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from moellava.registration import register_with_transformers

if TYPE_CHECKING:
    from moellava.data import check_rows, read_rows, register_format
    from moellava.encoders import (
        VisionEncoder,
        create_encoder,
        detect_encoder_type,
        register_encoder,
    )
    from moellava.images import load_image
    from moellava.model import (
        MoeLlavaConfig,
        MoeLlavaForConditionalGeneration,
        MoeLlavaModel,
        MoeLlavaProcessor,
    )
    from moellava.model.build.request import CustomVisionConfig
    from moellava.model.builder_enhanced import load_pretrained_model, load_vision_encoder
    from moellava.model.checkpoint.difference import load_trainable, save_trainable
    from moellava.model.checkpoint.projector_file import read_projector, save_projector
    from moellava.model.describe import describe
    from moellava.model.language_model import (
        LlamaMoeConfig,
        LlamaMoeForCausalLM,
        LlamaMoeModel,
    )
    from moellava.model.loaded_model import LoadedModel
    from moellava.model.projector import register_projector
    from moellava.train import load_recipe

__version__ = "0.1.0"

# Where each public name is defined; the imports above say the same to type checkers.
_MODULES = {
    "moellava.data": ("check_rows", "read_rows", "register_format"),
    "moellava.encoders": (
        "VisionEncoder",
        "create_encoder",
        "detect_encoder_type",
        "register_encoder",
    ),
    "moellava.images": ("load_image",),
    "moellava.model": (
        "MoeLlavaConfig",
        "MoeLlavaForConditionalGeneration",
        "MoeLlavaModel",
        "MoeLlavaProcessor",
    ),
    "moellava.model.build.request": ("CustomVisionConfig",),
    "moellava.model.builder_enhanced": ("load_pretrained_model", "load_vision_encoder"),
    "moellava.model.checkpoint.difference": ("load_trainable", "save_trainable"),
    "moellava.model.checkpoint.projector_file": ("read_projector", "save_projector"),
    "moellava.model.describe": ("describe",),
    "moellava.model.language_model": ("LlamaMoeConfig", "LlamaMoeForCausalLM", "LlamaMoeModel"),
    "moellava.model.loaded_model": ("LoadedModel",),
    "moellava.model.projector": ("register_projector",),
    "moellava.train": ("load_recipe",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("data", "encoders", "eval", "images", "model", "storage", "testing", "train")

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name in _PACKAGES:
        return import_module(f"moellava.{name}")
    raise AttributeError(f"module 'moellava' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES, "__version__"})


register_with_transformers()

"""The weights of a joined model, read strictly: `load_weights`."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration
from moellava.storage.weights import require_loaded


def load_weights(path: str | None, name: str, **options: Any) -> MoeLlavaForConditionalGeneration:
    """`from_pretrained`, but strict: transformers only logs missing tensors, and leaves some of them uninitialised."""
    try:
        loaded: Any = MoeLlavaForConditionalGeneration.from_pretrained(
            path, output_loading_info=True, **options
        )
    except SafetensorError as error:  # it does not say which file
        broken = [
            file.name
            for file in sorted(Path(path or "").glob("*.safetensors"))
            if not _is_readable(file)
        ]
        raise OSError(
            f"A weights file of {name!r} cannot be read; is it complete? {', '.join(broken)} ({error}). Copy or save "
            "it again."
        ) from error
    model, info = loaded
    require_loaded(name, info)
    return model


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False

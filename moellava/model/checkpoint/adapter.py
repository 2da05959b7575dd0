"""Folders of adapters, in PEFT's own files.

| name | what it does |
|---|---|
| `read_adapter` | the model with the adapter of a folder around it |
| `require_known_kind` | an error for an adapter that `read_adapter` would refuse |
| `name_base` | the folder says which base it is for, without a path of this machine |
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from moellava.messages import unknown_name
from moellava.model.quantization.adapters import accept_rounded
from moellava.storage.errors import reading
from moellava.storage.sources import read_json
from moellava.storage.writing import write_json

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG_FILE = "adapter_config.json"
# Prompt tuning loads a tokenizer that its config names, and X-LoRA other adapters.
KINDS = ("ADALORA", "IA3", "LOHA", "LOKR", "LORA")


def read_adapter(model: PreTrainedModel, folder: Path) -> "PeftModel":
    """A PEFT model around `model`, whose weights are not merged.

    Raises:
        OSError: a file is missing.
        ValueError: a file cannot be read, or the adapter is of a kind that could run code.
    """
    from peft import PeftConfig, PeftModel  # only those who saved an adapter need it

    settings = read_json(folder / CONFIG_FILE)
    with reading(folder / CONFIG_FILE, "an adapter's config"):
        require_known_kind(str(settings.get("peft_type")))
    if settings.get("megatron_config") is not None:
        raise ValueError(
            f"{folder / CONFIG_FILE} has a megatron_config, for which some versions of PEFT import "
            "a module that the file names. Remove it: moellava's models are not of Megatron."
        )
    with reading(folder, "an adapter"):
        config = accept_rounded(PeftConfig.from_pretrained(str(folder)), model)
        adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), config=config)
    return adapted


def require_known_kind(kind: str) -> None:
    """Raise `ValueError` unless adapters of this kind can be opened."""
    if kind not in KINDS:
        raise unknown_name("kind of adapter (peft_type)", kind, KINDS)


def name_base(folder: Path, name: str | None) -> None:
    """Put a hub id or a plain name in place of the base's path; nothing without an adapter."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form, which has the path too
    settings: dict[str, Any] = read_json(path)
    write_json(path, {**settings, "base_model_name_or_path": name})

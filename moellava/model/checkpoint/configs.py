"""The small files of a checkpoint: its config, architecture, generation config, and dtypes by name."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


def load_model_config(model_name_or_path: str | Path, **hub: Any) -> PreTrainedConfig:
    """Load the config of a language model or of a saved multimodal model, with an error that helps.

    Raises:
        OSError: if there is no `config.json` at that id or folder, or it is none that transformers knows.
    """
    name, place = _place_of(model_name_or_path)
    try:
        return AutoConfig.from_pretrained(place, **hub)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error


def model_type_of(model_name_or_path: str | Path, **hub: Any) -> str:
    """What `config.json` calls its architecture, also where transformers does not know it. Errors as above."""
    name, place = _place_of(model_name_or_path)
    try:
        return PreTrainedConfig.get_config_dict(place, **hub)[0].get("model_type", "")
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error


def _place_of(model_name_or_path: str | Path) -> tuple[str, str]:
    name = str(model_name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise OSError(
            f"The folder {name!r} is no checkpoint: it has no config.json (found: {', '.join(found) or 'nothing'}). "
            "Give the folder that save_pretrained wrote."
        )
    return name, str(folder) if folder.is_dir() else name


def _not_found(name: str, error: Exception) -> OSError:
    return OSError(
        f"No model {name!r} is found, neither as a folder nor on the hub or in its cache. "
        f"Check the spelling, or fetch it where there is a network: hf download {name}\n{error}"
    )


def load_generation_config(
    name: str, tokenizer: PreTrainedTokenizerBase, **hub: Any
) -> GenerationConfig:
    try:
        generation_config = GenerationConfig.from_pretrained(name, **hub)
    except OSError:  # optional in a repo; the tokenizer knows what is needed
        generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
        )
    # TinyLlama's file says 0 (<unk>), its tokenizer </s>: what pads the prompts pads the answers.
    generation_config.pad_token_id = tokenizer.pad_token_id
    return generation_config


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None for None and "auto", which leave the stored one."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or their names."
        )
    return found

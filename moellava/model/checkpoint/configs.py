"""The small files of a checkpoint: its config, architecture, generation config, and dtypes."""

from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from typing_extensions import Unpack

from moellava.storage.sources import HubKeywords, listing


def load_model_config(
    model_name_or_path: str | Path, **hub: Unpack[HubKeywords]
) -> PreTrainedConfig:
    """Load the config of a language model or of a saved multimodal model.

    Raises:
        OSError: if there is no `config.json` at that id or folder, or transformers does not know
            its architecture.
    """
    name, place = _place_of(model_name_or_path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place, **hub)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    return config


def model_type_of(model_name_or_path: str | Path, **hub: Unpack[HubKeywords]) -> str:
    """What `config.json` calls its architecture, even if transformers does not know it.

    Raises:
        OSError: as `load_model_config`.
    """
    name, place = _place_of(model_name_or_path)
    try:
        settings, _ = PreTrainedConfig.get_config_dict(place, **hub)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    return str(settings.get("model_type", ""))


def load_generation_config(
    model_name_or_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    **hub: Unpack[HubKeywords],
) -> GenerationConfig:
    """How a model generates unless told otherwise, with the tokenizer's padding token.

    A checkpoint without `generation_config.json` gets one with the tokenizer's own tokens.
    """
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(
            model_name_or_path,
            **hub,  # type: ignore[arg-type]  # a revision may be None
        )
    except OSError:  # optional in a repo; the tokenizer knows what is needed
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
        )
    # TinyLlama's file says 0 (<unk>), its tokenizer </s>: what pads the prompts pads the answers.
    config.pad_token_id = tokenizer.pad_token_id
    return config


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None for None and "auto", which leave the stored one."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or their "
            "names."
        )
    return found


def _place_of(model_name_or_path: str | Path) -> tuple[str, str]:
    """What the user wrote, and what transformers is asked for."""
    name = str(model_name_or_path)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name, name
    if not (folder / "config.json").is_file():
        raise OSError(
            f"The folder {name!r} is not a checkpoint: it has no config.json (found: "
            f"{listing(folder)}). Give the folder that save_pretrained wrote."
        )
    return name, str(folder)


def _not_found(name: str, error: Exception) -> OSError:
    return OSError(
        f"No model {name!r} is found, neither as a folder nor on the hub or in its cache. Check "
        f"the spelling, or fetch it on a machine with a network: hf download {name}\n{error}"
    )

"""The parts of a model by their names: config, tokenizer, image encoder, generation config.

Public names: `load_model_config`, `load_tokenizer`, `load_encoder`, `load_generation_config`, `model_type_of`,
`as_dtype`.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model.build_request import BuildRequest

IMAGE_TOKEN = "<image>"


def load_tokenizer(model_name_or_path: str | Path, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer, give it a token `<image>` and, where it has none, a padding token.

    Args:
        model_name_or_path: hub id or folder of the language model.
        **hub: `revision`, `cache_dir`, `local_files_only`, as in transformers.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise OSError(f"No tokenizer can be read at {str(model_name_or_path)!r}: {error}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        # Padding is found by the attention mask, never by this id, so that sharing it with </s> does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def load_encoder(request: BuildRequest, **options: Any) -> VisionEncoder:
    """The image encoder of a request, its width checked against `mm_hidden_size`; options of `create_encoder`."""
    encoder = create_encoder(
        request.encoder_type,
        request.mm_vision_tower,
        image_size=request.image_size,
        select_layer=request.vision_feature_layer,
        select_feature=request.vision_feature_select_strategy,
        **options,
    )
    if request.mm_hidden_size not in (None, encoder.hidden_size):
        raise ValueError(
            f"mm_hidden_size is {request.mm_hidden_size}, but {request.mm_vision_tower} gives patch tokens of width "
            f"{encoder.hidden_size}. Set mm_hidden_size={encoder.hidden_size}, or leave it out."
        )
    return encoder


def load_generation_config(name: str, tokenizer: PreTrainedTokenizerBase, **hub: Any) -> GenerationConfig:
    try:
        generation_config = GenerationConfig.from_pretrained(name, **hub)
    except OSError:  # optional in a repo; the tokenizer knows what is needed
        generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    # TinyLlama's file says 0 (<unk>), its tokenizer </s>: what pads the prompts pads the answers.
    generation_config.pad_token_id = tokenizer.pad_token_id
    return generation_config


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by itself or by its name; None for None and "auto", which leave the stored one."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16 or torch.float16, or their names.")
    return found

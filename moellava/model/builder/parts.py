"""The parts of a model by their names: tokenizer and image encoder."""

from pathlib import Path

import torch
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import Unpack

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model.builder.request import BuildRequest
from moellava.storage.errors import reading
from moellava.storage.sources import HubKeywords, HubOptions

IMAGE_TOKEN = "<image>"


def load_tokenizer(
    model_name_or_path: str | Path, **hub: Unpack[HubKeywords]
) -> PreTrainedTokenizerBase:
    """Load a language model's tokenizer, with a token `<image>` and a padding token.

    Args:
        model_name_or_path: hub id or folder of the language model.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, as in transformers.
    """
    try:
        with reading(model_name_or_path, "a tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                model_name_or_path, trust_remote_code=False, **hub
            )
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer can be read at {str(model_name_or_path)!r}: {error}"
        ) from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([image], special_tokens=True)
    if tokenizer.pad_token is None:
        # Padding is found by the attention mask, never by this id: it may be that of </s>.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_encoder(
    request: BuildRequest,
    hub: HubOptions,
    *,
    load_text: bool = False,
    fallback_to_default: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> VisionEncoder:
    """The image encoder of a request, its width checked against `mm_hidden_size`.

    Args:
        hub: of the tower.
        load_text, fallback_to_default, device, dtype: as in `create_encoder`.
    """
    encoder = create_encoder(
        request.encoder_type,
        request.mm_vision_tower,
        load_text=load_text,
        fallback_to_default=fallback_to_default,
        device=device,
        dtype=dtype,
        **hub.keywords,
        **request.encoder_options,
    )
    if request.mm_hidden_size not in (None, encoder.hidden_size):
        raise ValueError(
            f"mm_hidden_size is {request.mm_hidden_size}, but {request.mm_vision_tower} gives "
            f"patch tokens of width {encoder.hidden_size}. Set "
            f"mm_hidden_size={encoder.hidden_size}, or leave it out."
        )
    return encoder

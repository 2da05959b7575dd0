"""The parts of a model by their names: config, tokenizer, image encoder, generation config.

Public names: `load_model_config`, `load_tokenizer`, `load_encoder`, `load_generation_config`, `model_type_of`,
`as_dtype`.
"""

from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from moellava.encoders import VisionEncoder, create_encoder
from moellava.model.build.request import BuildRequest

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
        raise OSError(
            f"No tokenizer can be read at {str(model_name_or_path)!r}: {error}"
        ) from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens(
            [AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True
        )
    if tokenizer.pad_token is None:
        # Padding is found by the attention mask, never by this id, so that sharing it with </s> does no harm.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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

"""Stand-ins of LLaVA and LLaVA-NeXT: the files of transformers' repos, small random weights."""

from pathlib import Path
from typing import Any

import torch

from moellava.testing.language_models import write_llama_tokenizer

# llava-hf's own: content items, images first, Vicuna's roles without its system prompt.
LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_llava(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a repo laid out like `llava-hf/llava-1.5-7b-hf`: CLIP, Llama, images of 56 pixels.

    An image is 16 tokens.

    Args:
        folder: created if missing.
        text: further fields of the `LlamaConfig`.
        **options: of `LlavaConfig`, such as `vision_feature_layer`.

    Returns:
        The folder, with `config.json`, `model.safetensors`, the tokenizer and the processor.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    return _write(folder, LlavaProcessor, image_processor, dtype, text or {}, options)


def write_llava_next(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    text: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a repo laid out like `llava-hf/llava-v1.6-vicuna-7b-hf`, of the size of `write_llava`.

    Args:
        folder, text: as for `write_llava`; `model_type` of `text` may be another, such as mistral.
        **options: of `LlavaNextConfig`; `image_grid_pinpoints` are LLaVA-NeXT's, for 56 pixels.
    """
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    options = {
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
        **options,
    }
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=options["image_grid_pinpoints"],
    )
    return _write(folder, LlavaNextProcessor, image_processor, dtype, text or {}, options)


def _write(
    folder: Path,
    processor_class: Any,
    image_processor: Any,
    dtype: torch.dtype,
    text: dict[str, Any],
    options: dict[str, Any],
) -> Path:
    from transformers import (
        AddedToken,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoTokenizer,
        CLIPVisionConfig,
    )

    folder.mkdir(parents=True, exist_ok=True)
    write_llama_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(
        [AddedToken("<image>", special=True, normalized=False), "<pad>"], special_tokens=True
    )
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    text_config = {
        "model_type": "llama",
        "vocab_size": 32064,  # LLaVA-1.5's: padded to a multiple of 64
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **text,
    }
    config: Any = AutoConfig.for_model(
        "llava_next" if "image_grid_pinpoints" in options else "llava",
        vision_config=vision_config,
        text_config=AutoConfig.for_model(**text_config),
        image_token_index=32000,
        image_seq_length=16,
        **options,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    for name, weight in model.named_parameters():
        if "projector" in name or "class_embedding" in name or "newline" in name:
            torch.nn.init.normal_(weight, std=0.3)  # so that images matter to the logits
    model.to(dtype).save_pretrained(folder)
    processor_class(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder

"""The one way from prompts to answers: `generate_texts`."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase


@torch.inference_mode()
def generate_texts(
    model: GenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    **generation: Any,
) -> list[str]:
    """Continue left-padded prompts, greedily unless told otherwise.

    Args:
        inputs: what the processor made of the prompts, on the model's device.
        **generation: passed to `generate`; `max_new_tokens` is 64 unless given.

    Returns:
        The new text of each prompt, without special tokens and surrounding white space.
    """
    # A stored max_length (TinyLlama's is 2048) would be a second limit beside max_new_tokens.
    options = {"max_new_tokens": 64, "do_sample": False, "max_length": None, **generation}
    generated: Any = model.generate(**inputs, **options)  # (B, T + new)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(generated[:, num_prompt_tokens:], skip_special_tokens=True)
    return [text.strip() for text in texts]

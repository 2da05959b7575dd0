"""The one way from prompts to answers: `generate_texts`."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from moellava.messages import did_you_mean


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
        The new text of each prompt, without special tokens and surrounding white space;
        `num_return_sequences` texts per prompt if that is given.

    Raises:
        TypeError: for an option that `generate` does not have.
    """
    require_generation_options(generation)
    # A stored max_length (TinyLlama's is 2048) would be a second limit beside max_new_tokens.
    options = {"max_new_tokens": 64, "do_sample": False, "max_length": None, **generation}
    generated: Any = model.generate(**inputs, **options)
    # (B, T + new), alone or beside scores and hidden states
    sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
    num_prompt_tokens = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(sequences[:, num_prompt_tokens:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def require_generation_options(given: Mapping[str, object]) -> None:
    """Raise `TypeError` for a name that `generate` does not know; the nearest one is suggested."""
    known = {
        *inspect.signature(GenerationMixin.generate).parameters,
        *GenerationConfig().to_dict(),
    }
    for name in given:
        if name not in known:
            raise TypeError(
                f"generate has no option {name!r}.{did_you_mean(name, sorted(known))} The options "
                "are those of transformers' GenerationConfig."
            )

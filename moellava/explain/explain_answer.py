"""A model, images and a question → an `Explanation` of its answer."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moellava.explain.effects import AnswerScorer, ablation_map, gradient_map, mean_colour
from moellava.explain.explanation import Explanation
from moellava.explain.frames import measure_frame
from moellava.explain.grids import TokenGrid, find_token_grid
from moellava.explain.recording import Recording, record
from moellava.explain.routing import Routing, phases_of
from moellava.images import (
    ImageLike,
    Images,
    ViewOptions,
    as_image_list,
    to_eight_bit,
    to_pil,
)
from moellava.model.generation import require_generation_options
from moellava.model.loaded_model import LoadedModel


def explain(
    loaded: LoadedModel,
    images: Images,
    question: str,
    *,
    answer: str | None = None,
    blank: bool = True,
    gradient: bool = False,
    ablation: bool = False,
    blocks: tuple[int, int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
    max_bytes: int = 2**30,
    view: ViewOptions | None = None,
    **generation: object,
) -> Explanation:
    """Answer a question about images and record what happened inside.

    The answer is generated as `loaded.answer` does. Then prompt and answer go through the model
    once more, with eager attention of which only the rows of the answer and the columns of the
    image are kept.

    Args:
        images: one image or several of one prompt, of any kind that `loaded.answer` takes.
        answer: explain this answer in place of the model's own.
        blank: also record the same answer over blank images (each image's own mean colour).
        gradient: also compute gradient times input; one pass backwards.
        ablation: also compute the causal map; one pass for each block, `batch_size` at a time.
        blocks: rows and columns of the blocks of pixels that both use; by default half the grid of
            patches, so 7x7 of 14x14.
        progress: a progress bar for the ablation.
        max_bytes: memory that recording may take; a longer answer is refused before it starts.
        view: `window`, `frame`, `plane`, `volume`, `max_pixels`, as `moellava.images.load_image`.
        **generation: passed to `generate`; by default greedy, at most 64 new tokens.

    Raises:
        ValueError: for no image, an empty question or answer, a prompt that is longer than the
            context, or a recording that would take more than `max_bytes`.
    """
    require_generation_options(generation)
    pictures = [to_pil(image, **(view or {})) for image in _require_images(images)]
    if not question.strip():
        raise ValueError("The question is empty. Ask something about the image.")
    input_ids, pixel_values, num_prompt_tokens = _with_answer(
        loaded, pictures, question, answer, generation
    )
    model, tokenizer = loaded.model, loaded.tokenizer

    def recorded(pixels: Tensor) -> Recording:
        return record(
            model,
            input_ids,
            pixels,
            num_prompt_tokens=num_prompt_tokens,
            max_bytes=max_bytes // (2 if blank else 1),
        )

    seen = recorded(pixel_values)
    unseen = recorded(mean_colour(pixel_values)) if blank else None
    scorer = AnswerScorer(model, input_ids, num_prompt_tokens)
    blocks = blocks or _default_blocks(model.model.vision_tower.grid)
    grid, no_grid = _grid_or_reason(loaded)
    answer_ids: list[int] = input_ids[0, num_prompt_tokens:].tolist()
    sizes = {picture.size for picture in pictures}
    frames = {size: measure_frame(loaded.image_processor, size) for size in sizes}
    return Explanation(
        question=question,
        answer=str(tokenizer.decode(answer_ids)).strip(),
        tokens=tuple(_texts(loaded, answer_ids)),
        logprobs=seen.logprobs,
        pictures=tuple(to_eight_bit(picture).convert("RGB") for picture in pictures),
        frames=tuple(frames[picture.size] for picture in pictures),
        grid=grid,
        no_grid=no_grid,
        attention=seen.attention,
        rollout=seen.rollout,
        blank_attention=None if unseen is None else unseen.attention,
        blank_rollout=None if unseen is None else unseen.rollout,
        ablation=ablation_map(
            scorer, pixel_values, blocks, batch_size=batch_size, progress=progress
        )
        if ablation
        else None,
        gradient=gradient_map(scorer, pixel_values, blocks) if gradient else None,
        routing=_routing(loaded, seen, input_ids[0].tolist(), num_prompt_tokens),
    )


def _require_images(images: Images) -> list[ImageLike]:
    items: list[ImageLike] = as_image_list(images)
    if not items:
        raise ValueError("There is no image to explain. Give an image, or a list of them.")
    return items


def _with_answer(
    loaded: LoadedModel,
    pictures: Sequence[Image.Image],
    question: str,
    answer: str | None,
    generation: dict[str, object],
) -> tuple[Tensor, Tensor, int]:
    """Prompt and answer (1, T), pixel values, and how many tokens the prompt has."""
    processor, device = loaded.processor, loaded.model.device
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt], images=list(pictures), return_tensors="pt").to(device)
    prompt_ids: Tensor = inputs["input_ids"]
    options = {"max_new_tokens": 64, "do_sample": False, "max_length": None, **generation}
    if answer is None:
        _require_room(loaded, prompt_ids.shape[1], int(str(options["max_new_tokens"])))
        with torch.inference_mode():
            ids = loaded.model.generate(**inputs, **options)[0].tolist()
    else:
        whole = processor(text=[prompt + answer], images=list(pictures), return_tensors="pt")
        ids = whole["input_ids"][0].tolist()
    num_prompt_tokens = _common_length(prompt_ids[0].tolist(), ids)
    specials = set(loaded.tokenizer.all_special_ids)
    while len(ids) > num_prompt_tokens and ids[-1] in specials:
        ids.pop()
    if len(ids) == num_prompt_tokens:
        raise ValueError(
            "There is nothing to explain: the answer is empty. Pass answer='...' to explain one of "
            "your own."
        )
    _require_room(loaded, len(ids), 0)
    return torch.tensor([ids], device=device), inputs["pixel_values"], num_prompt_tokens


def _require_room(loaded: LoadedModel, num_tokens: int, num_new: int) -> None:
    excess = num_tokens + num_new - loaded.context_len
    if excess > 0:
        raise ValueError(
            f"The prompt has {num_tokens} tokens and max_new_tokens is {num_new}, but the context "
            f"holds {loaded.context_len}: {excess} too many. Shorten the question, pass fewer "
            "images, or lower max_new_tokens."
        )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share; a tokenizer may join a prompt's end with the answer."""
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (one, other) in enumerate(pairs) if one != other),
        min(len(first), len(second)),
    )


def _default_blocks(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)


def _grid_or_reason(loaded: LoadedModel) -> tuple[TokenGrid | None, str | None]:
    try:
        return find_token_grid(loaded.model), None
    except ValueError as error:
        return None, str(error)


def _texts(loaded: LoadedModel, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it."""
    whole = [str(loaded.tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
    return [text[len(before) :] for before, text in zip(["", *whole], whole, strict=False)]


def _routing(
    loaded: LoadedModel, seen: Recording, ids: list[int], num_prompt_tokens: int
) -> Routing | None:
    if seen.experts is None or seen.weights is None:
        return None
    config = loaded.model.config
    is_image = [token == config.image_token_id for token in ids]
    return Routing(
        layers=tuple(config.text_config.moe_layer_indices),
        num_experts=config.text_config.num_experts,
        experts=seen.experts,
        weights=np.asarray(seen.weights),
        tokens=tuple(loaded.tokenizer.convert_ids_to_tokens(ids)),
        phases=phases_of(is_image, num_prompt_tokens),
    )

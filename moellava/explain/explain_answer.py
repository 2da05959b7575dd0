"""A model, images and a question → an `Explanation` of its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, DynamicCache

from moellava.explain.effects import AnswerScorer, ablation_map, gradient_map, mean_colour
from moellava.explain.explanation import Explanation
from moellava.explain.frames import view_frames
from moellava.explain.grids import TokenGrid, find_token_grid
from moellava.explain.recording import (
    Recording,
    has_whole_cache,
    record,
    record_generation,
    recording_bytes,
)
from moellava.explain.routing import Routing, phases_of
from moellava.images import Images, PartOptions, as_image_list, to_eight_bit
from moellava.model.conversation import generation_options
from moellava.model.generation import (
    generate_answers,
    new_answer,
    require_generation_options,
    require_room,
)
from moellava.model.loaded_model import LoadedModel
from moellava.model.turns import Message, with_images


def explain(
    loaded: LoadedModel,
    images: "Images | None",
    question: str | Sequence[Message],
    *,
    answer: str | None = None,
    blank: bool = True,
    gradient: bool = False,
    ablation: bool = False,
    blocks: tuple[int, int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
    max_bytes: int = 2**30,
    view: PartOptions | None = None,
    **generation: object,
) -> Explanation:
    """Answer a question about images and record what happened inside.

    The answer is that of `loaded.answer`. Attention is recorded while it is generated, and only
    the rows of the answer and the columns of the image are kept. With beams, a cache of another
    kind or an answer of one's own, prompt and answer go through the model once more for it.

    Args:
        images: one image or several of one prompt, of any kind that `loaded.answer` takes; None if
            they stand in the messages.
        question: a string, or chat messages whose last turn is answered, as `loaded.answer` takes.
        answer: explain this answer in place of the model's own.
        blank: also record the same answer over blank images (each image's own mean colour).
        gradient: also compute gradient times input; one pass backwards.
        ablation: also compute the causal map; one pass for each block, `batch_size` at a time.
        blocks: rows and columns of the blocks of pixels that both use; by default half the grid of
            patches, so 7x7 of 14x14.
        progress: a progress bar for the ablation.
        max_bytes: memory that recording may take; a longer answer is refused before it starts.
        view: `window`, `frame`, `slices`, ..., see `moellava.images.PartOptions`. Each picture that
            an image stands for is explained as an image of its own.
        **generation: passed to `generate`; by default greedy, at most 64 new tokens.

    Raises:
        ValueError: for no image, an empty question or answer, a prompt that is longer than the
            context, or a recording that would take more than `max_bytes`.
    """
    require_generation_options(generation)
    given = [] if images is None else as_image_list(images)
    messages, pictures = with_images(question, given, view or {})
    if not pictures:
        raise ValueError("There is no image to explain. Give an image, or a list of them.")
    asked = question if isinstance(question, str) else _text_of(question[-1])
    if not asked.strip():
        raise ValueError("The question is empty. Ask something about the image.")
    prompt = _write_prompt(loaded, pictures, messages)
    max_bytes = max_bytes // (2 if blank else 1)
    seen = None
    if answer is None:
        input_ids, seen = _generated(loaded, prompt.inputs, generation, max_bytes)
        num_prompt_tokens = prompt.inputs["input_ids"].shape[1]
    else:
        input_ids, num_prompt_tokens = _given(loaded, prompt, pictures, answer)
    pixel_values, image_sizes = prompt.inputs["pixel_values"], prompt.inputs.get("image_sizes")
    model, tokenizer = loaded.model, loaded.tokenizer
    recorded = partial(
        record,
        model,
        input_ids,
        num_prompt_tokens=num_prompt_tokens,
        image_sizes=image_sizes,
        max_bytes=max_bytes,
    )
    seen = seen or recorded(pixel_values)
    unseen = recorded(mean_colour(pixel_values)) if blank else None
    scorer = AnswerScorer(model, input_ids, num_prompt_tokens, image_sizes)
    blocks = blocks or _default_blocks(model.model.vision_tower.grid)
    grid, no_grid = _grid_or_reason(loaded)
    answer_ids: list[int] = input_ids[0, num_prompt_tokens:].tolist()
    sizes = {picture.size for picture in pictures}
    frames = {size: view_frames(loaded.processor, size) for size in sizes}
    views = [(picture, frame) for picture in pictures for frame in frames[picture.size]]
    return Explanation(
        question=asked,
        answer=str(tokenizer.decode(answer_ids)).strip(),
        tokens=tuple(_texts(loaded, answer_ids)),
        logprobs=seen.logprobs,
        pictures=tuple(to_eight_bit(picture).convert("RGB") for picture, _ in views),
        frames=tuple(frame for _, frame in views),
        tile_grids=tuple(loaded.processor.grid(picture.size) for picture in pictures),
        num_views=tuple(len(frames[picture.size]) for picture in pictures),
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


def _text_of(message: Message) -> str:
    """The text of a message as it was given."""
    if isinstance(content := message["content"], str):
        return content
    content = cast(Sequence[Mapping[str, object]], content)
    return "".join(str(item["text"]) for item in content if item.get("type") == "text")


@dataclass(frozen=True)
class _Prompt:
    text: str
    inputs: BatchFeature  # of one row, on the model's device


def _write_prompt(
    loaded: LoadedModel, pictures: Sequence[Image.Image], messages: Sequence[Message]
) -> _Prompt:
    processor = loaded.processor
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=list(pictures), return_tensors="pt")
    return _Prompt(text, inputs.to(loaded.model.device))


def _given(
    loaded: LoadedModel, prompt: _Prompt, pictures: Sequence[Image.Image], answer: str
) -> tuple[Tensor, int]:
    """Prompt and a given answer (1, T), and how many of the tokens are the prompt's."""
    texts = [prompt.text + answer]
    whole = loaded.processor(text=texts, images=list(pictures), return_tensors="pt")
    ids: list[int] = whole["input_ids"][0].tolist()
    num_prompt_tokens = _common_length(prompt.inputs["input_ids"][0].tolist(), ids)
    answer_ids = _without_end(loaded, ids[num_prompt_tokens:])
    num_tokens = num_prompt_tokens + len(answer_ids)
    _require_room(loaded, prompt.inputs, num_tokens, 0, "Prompt and answer")
    return torch.tensor([ids[:num_tokens]], device=loaded.model.device), num_prompt_tokens


def _generated(
    loaded: LoadedModel, inputs: BatchFeature, generation: Mapping[str, object], max_bytes: int
) -> tuple[Tensor, Recording | None]:
    """Prompt and the model's own answer (1, T); recorded on the way if that is possible."""
    if generation.get("num_return_sequences", 1) != 1:
        raise ValueError("An explanation is of one answer. Leave num_return_sequences out.")
    model, options = loaded.model, generation_options(loaded, generation)
    prompt_ids: Tensor = inputs["input_ids"]
    growing = new_answer(model, loaded.tokenizer, options)
    num_prompt_tokens, num_new = prompt_ids.shape[1], growing.max_new_tokens
    _require_room(loaded, inputs, num_prompt_tokens, num_new, "The prompt")

    def generate(cache: DynamicCache | None) -> list[int]:
        generate_answers(model, {**inputs, "cache": cache}, [growing], **options)
        ids = growing.token_ids
        # At a string that ends the turn, its tokens are there, but not in the text.
        while ids and growing.text in loaded.tokenizer.decode(ids[:-1], skip_special_tokens=True):
            ids = ids[:-1]
        return _without_end(loaded, ids)

    is_plain = options.get("num_beams", 1) == 1 and options.get("use_cache", True)
    is_plain = is_plain and options.get("cache_implementation") is None and has_whole_cache(model)
    needed = recording_bytes(
        model.config.get_text_config(),
        num_prompt_tokens + num_new,
        num_new,
        _num_image_tokens(loaded, inputs),
    )
    if is_plain and needed <= max_bytes:
        answer_ids, recording = record_generation(model, prompt_ids, generate)
    else:
        answer_ids, recording = generate(None), None
    return torch.cat([prompt_ids, prompt_ids.new_tensor([answer_ids])], dim=1), recording


def _without_end(loaded: LoadedModel, ids: Sequence[int]) -> list[int]:
    """The tokens of an answer without special ones at its end.

    Raises:
        ValueError: if none are left.
    """
    left, specials = list(ids), set(loaded.tokenizer.all_special_ids)
    while left and left[-1] in specials:
        left.pop()
    if not left:
        raise ValueError(
            "There is nothing to explain: the answer is empty. Pass answer='...' to explain one of "
            "your own."
        )
    return left


def _require_room(
    loaded: LoadedModel, inputs: BatchFeature, num_tokens: int, num_new: int, what: str
) -> None:
    num_image_tokens = _num_image_tokens(loaded, inputs)
    require_room(num_tokens, num_image_tokens, num_new, loaded.context_len, what)


def _num_image_tokens(loaded: LoadedModel, inputs: BatchFeature) -> int:
    return int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())


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

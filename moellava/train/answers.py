"""Held-out rows → the model's answers beside the truth: `answer_rows`, `share_exact`."""

import copy
from collections.abc import Mapping, Sequence
from typing import TypedDict

from moellava.data.chat_labels import Messages, image_items, without_pictures
from moellava.data.collate import ChatCollator, id_of, messages_of
from moellava.data.rows import Row
from moellava.eval.metrics import is_exact_answer
from moellava.model.generation import generate_texts, turn_end_options
from moellava.model.loaded_model import LoadedModel


class Answer(TypedDict):
    """What a held-out row asked, what the model said, and what is right."""

    id: object
    question: str
    answer: str
    truth: str


def answer_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    collator: ChatCollator,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Answer]:
    """Ask what each row asks first, greedily, in the format that it was trained in."""
    was_training = loaded.model.training
    loaded.model.train(False)
    answers: list[Answer] = []
    for start in range(0, len(rows), batch_size):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        asked = [_first_question(messages_of(row)) for row in batch]
        texts = _answer_batch(
            loaded, [messages for messages, _ in asked], collator, max_new_tokens=max_new_tokens
        )
        for index, (row, (messages, truth), text) in enumerate(
            zip(batch, asked, texts, strict=True)
        ):
            answers.append(
                {
                    "id": id_of(row, start + index),
                    "question": _words(messages[-1]),
                    "answer": text,
                    "truth": truth,
                }
            )
    loaded.model.train(was_training)
    return answers


def share_exact(answers: Sequence[Answer]) -> float:
    """Share of the answers that are exact, by `moellava.eval.metrics.is_exact_answer`."""
    exact = [is_exact_answer(answer["answer"], answer["truth"]) for answer in answers]
    return sum(exact) / len(exact)


def _answer_batch(
    loaded: LoadedModel,
    conversations: Sequence[Messages],
    collator: ChatCollator,
    *,
    max_new_tokens: int,
) -> list[str]:
    processor = copy.copy(loaded.processor)
    processor.chat_template = collator.chat_template
    images = [
        collator.load_image(item["image"])
        for messages in conversations
        for item in image_items(messages)
    ]
    prompts = [
        processor.apply_chat_template(
            without_pictures(messages), tokenize=False, add_generation_prompt=True
        )
        for messages in conversations
    ]
    inputs = processor(
        text=prompts,
        images=images or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(loaded.model.device)
    ends = turn_end_options(loaded.model, processor.tokenizer, collator.chat_template)
    return generate_texts(
        loaded.model,
        processor.tokenizer,
        inputs,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        **ends,
    )


def _first_question(messages: Messages) -> tuple[Messages, str]:
    """The messages before the first answer, and that answer."""
    place = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:place], _words(messages[place])


def _words(message: Mapping[str, object]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    assert isinstance(content, list)  # the other form that chat templates know
    return "".join(item["text"] for item in content if item["type"] == "text").strip()

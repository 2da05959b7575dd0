"""Held-out rows → the model's answers beside the truth.

Public names: `answer_rows`, `share_exact`.
"""

import copy
from collections.abc import Sequence
from typing import Any

from moellava.data.chat_labels import image_items, without_pictures
from moellava.data.collate import ChatCollator, id_of, messages_of
from moellava.eval.metrics import is_exact_answer
from moellava.model.generation import generate_texts
from moellava.model.loaded_model import LoadedModel


def answer_rows(
    loaded: LoadedModel,
    rows: Sequence[Any],
    collator: ChatCollator,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Ask what each row asks first, greedily, in the format that it was trained in.

    Returns:
        For each row `id`, `question`, `answer` and `truth`.
    """
    processor = copy.copy(loaded.processor)
    processor.chat_template = collator.chat_template
    was_training = loaded.model.training
    loaded.model.eval()
    answers: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch_size):
        asked, truths = zip(
            *(_first_question(messages_of(row)) for row in rows[start : start + batch_size]),
            strict=True,
        )
        images = [
            collator.load_image(item["image"])
            for messages in asked
            for item in image_items(messages)
        ]
        prompts = [
            processor.apply_chat_template(
                without_pictures(messages), tokenize=False, add_generation_prompt=True
            )
            for messages in asked
        ]
        inputs = processor(
            text=prompts,
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(loaded.model.device)
        texts = generate_texts(
            loaded.model,
            processor.tokenizer,
            inputs,
            max_new_tokens=max_new_tokens,
            use_cache=True,
        )
        for index, (messages, truth, text) in enumerate(zip(asked, truths, texts, strict=True)):
            row = rows[start + index]
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


def share_exact(answers: Sequence[dict[str, Any]]) -> float:
    """Share of the answers that are the truth word for word; case and a final period do not count."""
    exact = [is_exact_answer(answer["answer"], answer["truth"]) for answer in answers]
    return sum(exact) / len(exact)


def _first_question(messages: Sequence[Any]) -> tuple[list[Any], str]:
    """The messages before the first answer, and that answer."""
    place = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:place]), _words(messages[place])


def _words(message: Any) -> str:
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(item["text"] for item in message["content"] if item["type"] == "text").strip()

"""Rows → what stage `reward` asks, with the truths that its rewards compare: `PromptRows`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from moellava.data.collate import messages_of
from moellava.data.rows import Row
from moellava.eval.questions import Question, questions_of
from moellava.images import ImageLike


class PromptRows:
    """The questions of rows in the form of TRL's data sets; images are opened when asked for.

    Args:
        load_image: opens what a row holds.
    """

    def __init__(self, rows: Sequence[Row], load_image: Callable[[ImageLike], Image.Image]) -> None:
        self.rows, self.load_image = rows, load_image
        self.questions: list[Question] = list(questions_of(rows))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`prompt`, messages up to the question with a place for each image; `images`, opened;
        `truth`, `answer_type` and `options`, which `moellava.eval.rewards` looks at.
        """
        question = self.questions[number]
        row = self.rows[question.row_number]
        asked = Row(
            id=question.id,
            images=row.images[: len(question.image_names)],
            turns=question.turns,
        )
        images: list[Image.Image] = []
        prompt = [
            {"role": message["role"], "content": self._content(message["content"], images)}
            for message in messages_of(asked)
        ]
        return {
            "prompt": prompt,
            "images": images,
            "truth": question.truth,
            "answer_type": question.answer_type,
            "options": list(question.options) or None,
        }

    def _content(
        self, content: str | Sequence[Mapping[str, Any]], images: list[Image.Image]
    ) -> list[dict[str, str]]:
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found = []
        for item in items:
            if item["type"] == "image":
                images.append(self.load_image(item["image"]))
                found.append({"type": "image"})
            else:
                found.append({"type": "text", "text": item["text"]})
        return found

    def batch(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[object]]:
        """A transform of `datasets`: the column `number` becomes the columns of `__getitem__`."""
        items = [self[number] for number in columns["number"]]
        return {name: [item[name] for item in items] for name in items[0]} if items else {}

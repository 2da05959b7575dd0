"""A saved model and conversations about images, for trainers that are not ours."""

import json
from pathlib import Path

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from tests.train.tiny import parts_of, write_tiny


def write_model(folder: Path) -> tuple[Path, list[dict]]:
    """A mixture, and rows with `messages` (`<image>` in the text) and `images`."""
    (folder / "tiny").mkdir()
    tiny = write_tiny(folder / "tiny")
    loaded = load_pretrained_model(parts_of(tiny), moe_config={"num_experts": 4}, dtype="float32")
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    rows = []
    for row in json.loads((tiny / "rows.json").read_text()):
        if "image" in row:
            asked, answered = row["conversations"]
            messages = [
                {"role": "user", "content": asked["value"]},
                {"role": "assistant", "content": answered["value"]},
            ]
            rows.append({"messages": messages, "images": [str(tiny / "images" / row["image"])]})
    return folder / "model", rows


def expected(model: Path, row: dict) -> tuple[list[int], list[int]]:
    """Token ids and labels of our own collator."""
    question = row["messages"][0]["content"].removeprefix("<image>\n")
    content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}, row["messages"][1]]
    batch = ChatCollator(load_pretrained_model(model).processor)([{"messages": chat}])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()

"""A conversation → a JSON file: what was said, of which images and views, with what settings."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from moellava import __version__
from moellava.model.conversation import Conversation
from moellava.model.turns import Picture, Turn
from moellava.storage.writing import write_json


def transcript(
    conversation: Conversation, *, model: str, settings: Mapping[str, object]
) -> dict[str, object]:
    """The conversation in plain types; images by name, not as pixels."""
    return {
        "model": model,
        "moellava": __version__,
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dict(settings),
        "messages": [_message(turn) for turn in conversation.turns],
    }


def save_transcript(path: str | Path, saved: Mapping[str, object]) -> None:
    """Write it as JSON, whole or not at all."""
    write_json(Path(path).expanduser(), saved)


def _message(turn: Turn) -> dict[str, object]:
    return {"role": turn.role, "content": [_item(item) for item in turn.content]}


def _item(item: str | Picture) -> dict[str, object]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    return {"type": "image", "image": item.name, **item.view}

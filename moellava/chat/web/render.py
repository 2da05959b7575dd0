"""What the page shows, as HTML in which every picture stands itself: nothing is served as a file.

| name | gives |
|---|---|
| `chat_messages` | the conversation for gradio's `Chatbot` |
| `viewer` | an image beside what the model sees of it |
| `explanation_panel` | where the model looked for an answer, and which experts worked |
"""

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from moellava.chat.web.images import PageImage, as_seen
from moellava.chat.web.session import Session
from moellava.explain import Explanation
from moellava.model.prompts import ChatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_DEVICE = "Research only, not a medical device."
_MAX_SIDE = 1024  # pixels of a shown picture
_NOT_A_CAUSE = (
    "Attention is not a cause: compare it with the blank image beside it, and with the ablation."
)


def chat_messages(session: Session) -> list[dict[str, str]]:
    """Questions with their pictures, and answers, in gradio's form."""
    messages = []
    for exchange in session.exchanges:
        pictures = "".join(
            f'<img alt="{escape(path.name)}" src="{_uri(small)}">'
            for (path, _), small in zip(exchange.sources, exchange.thumbnails, strict=True)
        )
        text = escape(exchange.question, quote=False)
        messages.append({"role": "user", "content": f"{pictures}\n\n{text}" if pictures else text})
        answer = escape(exchange.answer, quote=False)
        note = f"\n\n*{exchange.note}*" if exchange.note else ""
        messages.append({"role": "assistant", "content": f"{answer}{note}" or "…"})
    return messages


def viewer(loaded: ChatModel, image: PageImage | None) -> str:
    """The picture as it is shown now, and the pixels that the model gets."""
    if image is None:
        return ""
    try:
        picture = image.picture()
        seen = as_seen(loaded, picture)
    except (ValueError, OSError, ImportError) as error:
        return f'<p class="moellava-problem">{escape(" ".join(str(error).split()))}</p>'
    whole = _figure(
        _uri(_bounded(picture)), image.name, f"picture, {picture.width} × {picture.height}"
    )
    cropped = _figure(_uri(seen), "model input", f"model input, {seen.width} × {seen.height}")
    return f'<div class="moellava-pictures">{whole}{cropped}</div>'


def explanation_panel(explanation: Explanation, kind: str) -> tuple[str, str]:
    """The map of one kind over each image, and the experts' load and paths."""
    notes = [_NOT_A_CAUSE] if kind in ("attention", "rollout") else []
    if explanation.grid is None and kind in ("attention", "rollout"):
        pictures = f'<p class="moellava-problem">{escape(explanation.no_grid or "")}</p>'
    else:
        pictures = "".join(
            _figure(_drawn(explanation.draw_overlay(kind=kind, image=number)), kind, "")
            for number in range(len(explanation.pictures))
        )
    notes_html = "".join(f'<p class="moellava-note">{escape(note)}</p>' for note in notes)
    return notes_html + pictures, _routes(explanation)


def _routes(explanation: Explanation) -> str:
    if explanation.routing is None:
        return '<p class="moellava-note">This language model has no mixture of experts.</p>'
    figures = [explanation.draw_load()]
    if len(explanation.routing.layers) > 1:
        figures.append(explanation.draw_pathways())
    return "".join(_figure(_drawn(figure), "experts", "") for figure in figures)


def _figure(uri: str, alt: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="{uri}">{below}</figure>'


def _bounded(picture: Image.Image) -> Image.Image:
    shown = picture.convert("RGB")
    shown.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return shown


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _as_uri(file.getvalue())


def _drawn(figure: "Figure") -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.1)
    return _as_uri(file.getvalue())


def _as_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

"""One open page → its uploads, its conversation and the explanation of the last answer.

| name | gives |
|---|---|
| `Session` | of one page; nothing of it is kept once it is closed |
| `Sessions` | the open ones, by the name that the browser gives itself |
| `WebLimits` | what pages may cost |
"""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from moellava.chat.transcript import transcript
from moellava.chat.web.images import PageImage, read_uploads
from moellava.explain import Explanation, explain
from moellava.images import ViewOptions, to_pil
from moellava.model.conversation import Conversation, Pieces
from moellava.model.loaded_model import LoadedModel
from moellava.model.turns import Message, Picture

_THUMBNAIL = 96  # pixels
_SECONDS_BETWEEN_UPDATES = 0.05  # of a page; a faster one reads no better and costs the model time


@dataclass(frozen=True, kw_only=True)
class WebLimits:
    """What pages may cost; all are checked before the costly step."""

    file_bytes: int = 512 * 2**20  # of one uploaded file
    session_bytes: int = 2 * 2**30  # of all files of a page
    files: int = 4096  # of a page
    pixels: int = 64_000_000  # of one picture
    sessions: int = 16  # pages open at once; each keeps the cache of its conversation
    question: int = 8000  # characters


@dataclass(eq=False)
class Exchange:
    """A question and its answer so far, with the images that were sent with it."""

    question: str
    sources: list[tuple[Path, ViewOptions]]
    thumbnails: list[Image.Image]
    answer: str = ""
    note: str = ""  # such as "stopped"


class Session:
    """What one page holds. Uploads lie in a folder of its own, which `close` deletes."""

    def __init__(
        self, loaded: LoadedModel, parent: Path, *, name: str, system: str | None, limits: WebLimits
    ) -> None:
        self.loaded = loaded
        self.images: list[PageImage] = []
        self.exchanges: list[Exchange] = []
        self.explanation: Explanation | None = None
        self._name = name
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="page-", dir=parent))
        self._num_uploads = 0
        self._conversation = Conversation(loaded, system=system)
        self._settings: dict[str, object] = {}
        self._is_stopped = threading.Event()

    def add_files(self, uploads: Iterable[str]) -> list[str]:
        """Take uploaded files over; a message for each that is not an image."""
        moved = []
        for upload in map(Path, dict.fromkeys(uploads)):
            folder = self._folder / str(self._num_uploads)  # two files may have one name
            folder.mkdir()
            self._num_uploads += 1
            moved.append(Path(shutil.move(upload, folder / upload.name)))
        try:
            self._require_within_limits()
            images, errors = read_uploads(moved, self._limits.pixels)
        except ValueError as error:
            images, errors = [], [str(error)]
        self.images += images
        self._delete({*moved} - {file for image in images for file in image.files})
        return errors

    def remove(self, image: PageImage) -> None:
        """Forget an upload; what was asked about it stays in the conversation."""
        self.images.remove(image)
        asked = {path for exchange in self.exchanges for path, _ in exchange.sources}
        self._delete(path for path in image.files if path not in asked)

    def ask(self, question: str, **settings: object) -> Iterator[None]:
        """Ask about the images that wait; the last exchange grows between the steps.

        Raises:
            ValueError: an empty question, or more tokens than the context holds; nothing has
                changed then.
        """
        if not question.strip():
            raise ValueError("The question is empty. Write one.")
        if len(question) > self._limits.question:
            raise ValueError(
                f"The question has {len(question):,} characters; the limit is "
                f"{self._limits.question:,}."
            )
        asked = [image for image in self.images if image.is_waiting]
        exchange = Exchange(
            question,
            [image.source() for image in asked],
            [image.picture(_THUMBNAIL) for image in asked],
        )
        views = [image.view.copy() for image in asked]
        items = [{"image": str(path), **view} for path, view in exchange.sources]
        self._is_stopped.clear()
        pieces = self._conversation.stream(question, items, **settings)
        for image, view in zip(asked, views, strict=True):
            image.sent = view
        self.exchanges.append(exchange)
        self._settings, self.explanation = settings, None
        yield from self._follow(exchange, asked, pieces)

    def stop(self) -> None:
        """End the answer that is being written after the present token; from any thread."""
        self._is_stopped.set()

    def _follow(
        self, exchange: Exchange, asked: Sequence[PageImage], pieces: Pieces
    ) -> Iterator[None]:
        updated = 0.0
        # The model reads the question while the page is told to show it.
        reader = ThreadPoolExecutor(1)
        first = reader.submit(next, pieces, "")
        reader.shutdown(wait=False)
        try:
            yield
            for piece in chain([first.result()], pieces):
                exchange.answer += piece
                if self._is_stopped.is_set():
                    exchange.note = "stopped"
                    break
                if time.monotonic() - updated > _SECONDS_BETWEEN_UPDATES:
                    updated = time.monotonic()
                    yield
        except Exception:
            self.exchanges.remove(exchange)
            for image in asked:
                image.sent = None
            raise
        finally:
            wait([first])  # a generator that runs cannot be closed
            pieces.close()  # ends the answer if it was stopped

    def explain(self, *, ablation: bool = False) -> Explanation:
        """What the model looked at for the last answer, computed once.

        The question is taken with all turns before it, and with their images.

        Raises:
            ValueError: nothing to explain, or too long an answer.
        """
        if not self.exchanges or not self.exchanges[-1].answer.strip():
            raise ValueError("There is no answer to explain. Ask a question first.")
        known = self.explanation
        if known is not None and (known.ablation is not None or not ablation):
            return known
        self.explanation = explain(
            self.loaded,
            None,
            self._asked(),
            answer=self.exchanges[-1].answer,
            gradient=True,
            ablation=ablation,
        )
        return self.explanation

    def reset(self) -> None:
        """Begin a new conversation about the same images."""
        self._conversation.reset()
        self.exchanges, self.explanation = [], None
        for image in self.images:
            image.sent = None

    def saved(self) -> str:
        """The conversation and its settings as JSON; images by name and view."""
        content = transcript(self._conversation, model=self._name, settings=self._settings)
        return json.dumps(content, indent=2, ensure_ascii=False)

    def close(self) -> None:
        """Stop the answer and delete the uploads."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _asked(self) -> list[Message]:
        """All turns up to the last question, with their images read again."""
        sources = (source for exchange in self.exchanges for source in exchange.sources)

        def content(item: str | Picture) -> dict[str, object]:
            if isinstance(item, str):
                return {"type": "text", "text": item}
            path, view = next(sources)
            return {"type": "image", "image": to_pil(path, **view)}

        turns = self._conversation.turns
        last = max(place for place, turn in enumerate(turns) if turn.role == "user")
        return [
            {"role": turn.role, "content": [content(item) for item in turn.content]}
            for turn in turns[: last + 1]
        ]

    def _require_within_limits(self) -> None:
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        if len(files) > self._limits.files:
            raise ValueError(f"{len(files):,} files; the limit is {self._limits.files:,}.")
        num_bytes = sum(path.stat().st_size for path in files)
        if num_bytes > self._limits.session_bytes:
            raise ValueError(
                f"The files have {num_bytes:,} bytes together; the limit is "
                f"{self._limits.session_bytes:,}. Remove some first."
            )

    def _delete(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


class Sessions:
    """The open pages; all of them share one model, and wait for each other."""

    def __init__(
        self, loaded: LoadedModel, folder: Path, *, name: str, system: str | None, limits: WebLimits
    ) -> None:
        self.loaded = loaded
        self.arrivals = folder / "arrivals"  # uploads that no page has taken over yet
        self._pages = folder / "pages"
        self._system = system
        self.name = name
        self.limits = limits
        for part in (self.arrivals, self._pages):
            part.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, Session] = {}
        self._changing = threading.Lock()

    def get(self, key: str) -> Session:
        """The session of a page, opened when it is first asked for.

        Raises:
            ValueError: too many are open.
        """
        with self._changing:
            if key not in self._open:
                if len(self._open) >= self.limits.sessions:
                    raise ValueError(
                        f"{len(self._open)} pages are open, the limit. Close one, and reload this."
                    )
                self._open[key] = Session(
                    self.loaded,
                    self._pages,
                    name=self.name,
                    system=self._system,
                    limits=self.limits,
                )
            return self._open[key]

    def close(self, key: str) -> None:
        """Forget the session of a page that was left, and delete its uploads."""
        with self._changing:
            session = self._open.pop(key, None)
            if session is not None:
                session.close()
            if not self._open:  # of uploads that were broken off
                for path in self.arrivals.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

    def close_all(self) -> None:
        """Forget all of them."""
        for key in list(self._open):
            self.close(key)

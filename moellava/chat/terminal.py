"""Lines that a person types → streamed answers: the loop of `moellava chat`."""

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from moellava.chat.transcript import save_transcript, transcript
from moellava.images import PartOptions
from moellava.messages import unknown_name
from moellava.model.conversation import Conversation
from moellava.model.prompts import ChatModel, require_chat_template
from moellava.model.turns import read_pictures

HELP = """\
  /image PATH ...  show images with the next question
  /window NAME     lung, bone, brain, soft, CENTER,WIDTH, full; for the images that follow
  /frame NUMBER    a frame or slice, grid, or such as grid:9; for the images that follow
  /plane NAME      axial, coronal, sagittal; for the images that follow
  /slices NUMBER   so many slices of a volume or of a folder's DICOM series, each as an image
  /frames NUMBER   the same of a file of several frames
  /channels NAMES  three windows, one for each colour: lung,mediastinum,bone
                   none, in place of a value, takes a choice back
  /reset           forget the conversation
  /undo            take the last question back
  /save FILE       write the conversation as JSON
  /help            this list
  /quit            leave, as Ctrl-D does; Ctrl-C stops an answer"""

_VIEW_COMMANDS = ("window", "frame", "plane", "slices", "frames", "channels")


@dataclass
class TerminalChat:
    """A conversation at a prompt.

    Args:
        read: asks for a line, as `input` does; `EOFError` ends the chat.
        write: prints text as it is, without a line break.
        parse_view: the value of a window, frame or plane that was typed, checked.
        generation: options for `generate`.
    """

    loaded: ChatModel
    read: Callable[[str], str]
    write: Callable[[str], None]
    parse_view: Callable[[str, str], object]
    model_name: str = ""
    system: str | None = None
    generation: Mapping[str, object] = field(default_factory=dict)
    view: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_chat_template(self.loaded.processor)
        self.conversation = Conversation(self.loaded, system=self.system)
        self.waiting: list[dict[str, object]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._add_images,
            **{name: functools.partial(self._set_view, name) for name in _VIEW_COMMANDS},
            "reset": self._reset,
            "undo": lambda _: self.conversation.undo(),
            "save": self._save,
            "help": lambda _: self._say(HELP),
        }

    def run(self, images: Sequence[str] = ()) -> None:
        """Read lines until the end; mistakes are said, and the chat goes on."""
        for image in images:
            self._add_image(image)
        self._say("Research use only, not a medical device. /help lists the commands.")
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:  # as in a shell: a new line
                self.write("\n")
                continue
            if line.split(" ")[0] in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except KeyboardInterrupt:  # while an image is read or encoded, or an answer written
                self._say(" [stopped]")
            except (ValueError, OSError, ImportError) as error:
                self._say(f"error: {error}")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                raise unknown_name("command", name, (*self._commands, "quit"))
            self._commands[name](rest.strip())
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        with closing(self.conversation.stream(question, self.waiting, **self.generation)) as pieces:
            self.waiting = []
            for piece in pieces:
                self.write(piece)
        self.write("\n")

    def _add_images(self, text: str) -> None:
        if not text:
            raise ValueError("Give a path: /image scan.png")
        whole = Path(text).expanduser()
        # A path may hold spaces, bare or, as a terminal writes those dropped into it, quoted.
        for path in [text] if whole.exists() else shlex.split(text):
            self._add_image(path)

    def _add_image(self, path: str) -> None:
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"The image {path} does not exist.")
        view = cast(PartOptions, self.view)
        read_pictures(self.loaded.processor, path, **view)  # an unreadable one is said at once
        self.waiting.append({"image": str(Path(path).expanduser()), **self.view})
        self._say(f"{path} goes with the next question.")

    def _set_view(self, name: str, text: str) -> None:
        value = self.parse_view(name, text)
        self.view[name] = value
        for item in self.waiting:
            item[name] = value

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.waiting = []

    def _save(self, path: str) -> None:
        if not path:
            raise ValueError("Give a file: /save chat.json")
        saved = transcript(self.conversation, model=self.model_name, settings=self.generation)
        save_transcript(path, saved)
        self._say(f"Saved to {path}.")

    def _say(self, text: str) -> None:
        self.write(f"{text}\n")

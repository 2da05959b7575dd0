"""`predictions.jsonl` while it grows: `AnswerFile`, which a run that was killed carries on."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moellava.eval.predictions import Prediction, read_predictions
from moellava.messages import first_names
from moellava.storage.writing import replacing, write_json


class AnswerFile:
    """Predictions of one run, one line each, beside the settings that they were made with.

    Args:
        path: `NAME.jsonl`; the settings lie beside it, as `NAME.settings.json`.
        settings: what must be the same for lines of an earlier run to count.

    Raises:
        ValueError: the file has lines of other settings; those that differ are named.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]):
        self.path = path
        self.settings_path = path.with_suffix(".settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(json.dumps(settings))
        if path.exists() and self.settings_path.exists():
            self._require_same(known)
            _cut_last_line(path)
        else:
            path.unlink(missing_ok=True)
            write_json(self.settings_path, known)
            path.touch()
        self.done = {prediction.id for prediction in read_predictions(path)}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add lines, all of a batch at once."""
        predictions = list(predictions)
        lines = "".join(f"{prediction.as_line()}\n" for prediction in predictions)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
        self.done.update(prediction.id for prediction in predictions)

    def finish(self, order: Sequence[str]) -> None:
        """Put the lines into the order of the data, so that every way to the end gives one file."""
        place = {row_id: number for number, row_id in enumerate(order)}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # U+2028 ends no line
        lines.sort(key=lambda line: place[json.loads(line)["id"]])
        with replacing(self.path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _require_same(self, settings: Mapping[str, object]) -> None:
        earlier = json.loads(self.settings_path.read_text(encoding="utf-8"))
        names = sorted(earlier.keys() | settings.keys())
        differing = [name for name in names if earlier.get(name) != settings.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.path} has answers of other settings ({first_names(differing)}): {name} was "
                f"{earlier.get(name)!r} and is {settings.get(name)!r}. Choose another --out, or "
                "delete the folder to answer again."
            )


def _cut_last_line(path: Path) -> None:
    """Drop what stands behind the last newline: a process that was killed may leave half a line."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())

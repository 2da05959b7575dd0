"""Rows of any dataset → LLaVA's JSON, JSON lines, or parquet with the images inside."""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from moellava.data.layouts import EXTRA_COLUMN
from moellava.data.readers import Rows
from moellava.data.rows import Row
from moellava.images import ImageLike, ImagePart, exact_hash, load_image, to_eight_bit, to_pil
from moellava.images.kinds import HEADER_BYTES, kind_of_bytes
from moellava.storage.locking import locked
from moellava.storage.writing import replacing

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
_OUR_KEYS = {"id", "image", "images", "conversations", "conversatons", "choices", "source", "split"}
_OUR_KEYS |= {"answer_type", EXTRA_COLUMN}
_PARQUET_ROWS = 256  # in memory at a time


def convert_rows(
    rows: Rows,
    out: str | Path,
    *,
    images: str | Path | None = None,
    copy_images: bool = False,
    allow_outside: bool = False,
) -> int:
    """Write rows to `out`, by its suffix: `.json` (a LLaVA list), `.jsonl`, or `.parquet`.

    Nothing of a row is lost; all three are read back by `read_rows`.

    Args:
        images: the folder for images that have no file of their own (`.json`, `.jsonl`), named by
            content, so that an image of many rows is written once; by default `images` beside
            `out`.
        copy_images: copy images that do have files there, too; else their paths, relative to the
            source's image folder, stay as they are. Parquet always holds the images themselves.

        allow_outside: also put in images whose paths leave the source's image folder.

    Returns:
        How many rows were written.
    Raises:
        FileExistsError: `out` is there already.
        OSError: another process writes into its folder; it is named.
        ValueError: a suffix that is not known; a field that JSON cannot hold.
    """
    out = Path(out).expanduser()
    writers: dict[str, Callable[..., None]] = {
        ".json": _write_json,
        ".jsonl": _write_json,
        ".parquet": _write_parquet,
    }
    if out.suffix not in writers:
        raise ValueError(
            f"{out}: which kind of file? Give it one of the suffixes {', '.join(writers)}."
        )
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another name or delete it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(images).expanduser() if images else out.parent / "images"
    store = ImageStore(
        rows.image_root,
        folder,
        copy=copy_images and out.suffix != ".parquet",
        allow_outside=allow_outside,
    )
    with locked(out.parent), replacing(out) as part:
        writers[out.suffix](rows, part, out.suffix == ".json", store)
    return len(rows)


def to_llava(row: Row, images: Sequence[str]) -> dict[str, object]:
    """A row as LLaVA's JSON has it, with the further fields beside; `images` name the row's own."""
    record: dict[str, object] = {"id": row.id}
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    record["conversations"] = [
        {"from": SPEAKERS[turn.role], "value": turn.text} for turn in row.turns
    ]
    named = {
        "answer_type": row.answer_type,
        "split": row.split,
        "source": row.source,
        "choices": list(row.choices),
    }
    record |= {key: value for key, value in named.items() if value}
    # A field of the source may have the name of one of ours, which must not replace it.
    apart = {key: value for key, value in row.extra.items() if key in _OUR_KEYS}
    beside = {key: value for key, value in row.extra.items() if key not in _OUR_KEYS}
    return record | beside | ({EXTRA_COLUMN: json.dumps(apart)} if apart else {})


class ImageStore:
    """Gives each image of a row a file name, and writes those that have no file.

    Args:
        root: the folder that the rows' own paths start from.
        folder: where images are written; made when the first one is.
        copy: whether files are copied there, too.
        allow_outside: whether files outside `root` may be put in.
    """

    def __init__(
        self, root: Path, folder: Path, copy: bool, *, allow_outside: bool = False
    ) -> None:
        self.root, self.folder, self.copy = root, folder, copy
        self.allow_outside = allow_outside
        if copy and folder.resolve() == root.resolve():
            raise ValueError(
                f"Copies of images would land in {root}, the folder of the originals. "
                "Give another folder with --images-out."
            )

    def name(self, image: ImageLike) -> str:
        """The name for the JSON: relative to `root` for files, to `folder` for what was written."""
        if isinstance(image, str | os.PathLike):
            relative = os.path.relpath(image, self.root)
            is_inside = not relative.startswith("..")
            if not self.copy:
                return Path(relative).as_posix() if is_inside else str(Path(image).absolute())
            name = relative if is_inside else f"{exact_hash(image)[:16]}{Path(image).suffix}"
            return self._write(Path(name).as_posix(), self.content(image)[0])
        data, suffix = self.content(image)
        return self._write(f"{exact_hash(image)[:16]}{suffix}", data)

    def content(self, image: ImageLike) -> tuple[bytes, str]:
        """The bytes of an image that may be published, and their suffix.

        Raises:
            ValueError: a file outside the image folder, or one that is not an image.
        """
        source = image.source if isinstance(image, ImagePart) else image
        if isinstance(source, str | os.PathLike):
            path, root = Path(source).resolve(), self.root.resolve()
            if not self.allow_outside and not path.is_relative_to(root):
                raise ValueError(
                    f"{source} lies outside the image folder {self.root}. If it is meant to be put "
                    "into the set, give --allow-outside."
                )
            load_image(image)  # what is not an image must not be published under the name of one
        return encoded(image)

    def _write(self, name: str, data: bytes) -> str:
        target = self.folder / name
        if target.exists() and target.read_bytes() != data:  # of another set, or edited
            name = f"{exact_hash(data)[:16]}-{Path(name).name}"
            target = self.folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as part:
                part.write_bytes(data)
        return name


def encoded(image: ImageLike) -> tuple[bytes, str]:
    """The encoded bytes of an image and their suffix.

    Arrays, PIL images and parts of an image become PNG, which loses nothing. Bytes of no known kind
    are kept as they are, with the suffix `.bin`; `moellava data check` names them.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes(), Path(image).suffix
    if isinstance(image, bytes):
        kind = kind_of_bytes(image[:HEADER_BYTES])
        return image, ".bin" if kind is None else kind.suffixes[0]
    if isinstance(image, ImagePart):
        image = to_eight_bit(to_pil(image))
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if not isinstance(picture, Image.Image):
        raise ValueError(f"An image is a {type(image).__name__}; convert it to an array first.")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _write_json(rows: Rows, path: Path, is_list: bool, store: ImageStore) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            record = to_llava(row, [store.name(image) for image in row.images])
            before = ("[\n" if index == 0 else ",\n") if is_list else ""
            with _named(row):
                file.write(
                    before
                    + json.dumps(record, ensure_ascii=False, allow_nan=False)
                    + ("" if is_list else "\n")
                )
        file.write("\n]\n" if is_list else "")


def _write_parquet(rows: Rows, path: Path, is_list: bool, store: ImageStore) -> None:
    try:
        from datasets import Features, List, Value
        from datasets import Image as ImageFeature
        from pyarrow import Table
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise ImportError(
            "Writing parquet needs datasets. Type: pip install 'moellava[data]'"
        ) from error
    text = Value("string")
    names = ("answer_type", "split", "source")
    features = Features(
        {
            "id": text,
            "images": List(ImageFeature()),
            "conversations": List({"from": text, "value": text}),
            **dict.fromkeys(names, text),
            "choices": List(text),
            EXTRA_COLUMN: text,
        }
    )
    schema = features.arrow_schema  # with the hub's metadata, so that `datasets` knows the images
    with ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), _PARQUET_ROWS):
            records = []
            for row in rows[start : start + _PARQUET_ROWS]:
                record = to_llava(row, [])
                known = {
                    key: record.pop(key, None) for key in ("id", "conversations", *names, "choices")
                }
                with _named(row):
                    known[EXTRA_COLUMN] = json.dumps(
                        dict(row.extra), ensure_ascii=False, allow_nan=False
                    )
                known["images"] = [
                    {
                        "bytes": store.content(image)[0],
                        "path": store.name(image) if isinstance(image, str) else None,
                    }
                    for image in row.images
                ]
                records.append(known)
            writer.write_table(Table.from_pylist(records, schema=schema))


@contextmanager
def _named(row: Row) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"Row {row.id!r} has a field that JSON cannot hold: {error}") from error

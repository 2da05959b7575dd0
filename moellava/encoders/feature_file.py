"""Image files → one safetensors file of patch tokens, and back.

encode_files        writes it; a killed run is resumed
FeatureFile         reads it, one image at a time
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from moellava.encoders.base import VisionEncoder
from moellava.encoders.batches import encode_batches
from moellava.images import ImageLike, to_pil

# safetensors' words for the dtypes that a tower can have.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Fields of the encoder's config on which the tokens depend; they are in the file's metadata.
_SETTINGS = (
    *("tower", "revision", "grid", "image_size"),
    *("select_layer", "select_feature", "final_norm"),
)


class _Rows(Protocol):
    """safetensors' view of one tensor of a file."""

    def __getitem__(self, row: int) -> Tensor: ...

    def get_dtype(self) -> str: ...


class FeatureFile:
    """Patch tokens (N, D) by image; may be sent to the worker processes of a data loader."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.metadata: dict[str, str] = file.metadata()
        self._row_of = {name: row for row, name in enumerate(json.loads(self.metadata["names"]))}
        self._rows: _Rows | None = None

    @property
    def names(self) -> list[str]:
        """What the images are called, in the order of their rows."""
        return list(self._row_of)

    @property
    def dtype(self) -> torch.dtype:
        """What the patch tokens are stored as."""
        words = {word: dtype for dtype, word in _DTYPES.items()}
        return words[self._open().get_dtype()]

    def tokens(self, name: str) -> Tensor:
        """Patch tokens (N, D) of one image."""
        if name not in self._row_of:
            raise ValueError(
                f"{self.path} has no features of the image {name}. Delete the file to encode anew."
            )
        return self._open()[self._row_of[name]]

    def require_encoder(self, encoder: VisionEncoder) -> None:
        """Raise `ValueError` unless the file was written with an encoder of these settings."""
        for name in _SETTINGS:
            found, wanted = json.loads(self.metadata[name]), getattr(encoder.config, name)
            if _as_written_today(found) != wanted:
                raise ValueError(
                    f"{self.path} holds features of {name}={found!r}, but the model has "
                    f"{wanted!r}. Delete the file to encode anew, or choose another file."
                )

    def _open(self) -> _Rows:
        if self._rows is None:  # opened in the process that reads
            self._rows = safe_open(self.path, framework="pt").get_slice("patch_tokens")
        return self._rows

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None}


def encode_files(
    encoder: VisionEncoder,
    paths: Sequence[ImageLike],
    names: Sequence[str],
    out: Path,
    *,
    batch_size: int = 16,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    load_image: Callable[..., Image.Image] = to_pil,
    view: Mapping[str, object] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write `patch_tokens` (images, N, D) of image files, and their names, to a safetensors file.

    Memory is that of a batch, however many images. Work in progress lies in `<out>.partial`; a
    later call with the same images and tower resumes it. The file's metadata has the names, the
    tower's settings and the view.

    Args:
        paths: whatever `load_image` takes.
        dtype: what is stored; the encoder's if not given.
        view: options of `moellava.images.View`, such as `window`.
        metadata: kept in the file as it is.

    Returns:
        How many images an earlier, interrupted call had done.

    Raises:
        FileExistsError: `out` exists, or the unfinished work is of other images or another tower.
        ValueError: an image cannot be read; its file is named. The images before it are kept.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; give another name or delete it.")
    if not paths:
        raise ValueError("There are no images to encode.")
    partial = out.with_name(f"{out.name}.partial")
    journal = out.with_name(f"{out.name}.partial.done")
    dtype = dtype or encoder.dtype
    header = _header(encoder, names, dtype, view or {}, metadata or {})
    num_bytes = _bytes_per_image(encoder, dtype)
    done = _prepare(partial, journal, header, num_bytes * len(paths))
    if done < len(paths):
        load = functools.partial(load_image, **(view or {}))
        batches = encode_batches(
            encoder, paths[done:], batch_size=batch_size, progress=progress, load_image=load
        )
        with partial.open("r+b") as file:
            file.seek(len(header) + done * num_bytes)
            count = done
            for tokens in batches:
                file.write(tokens.to(dtype).contiguous().cpu().view(torch.uint8).numpy().data)
                file.flush()
                count += len(tokens)
                # After the data: a kill in between only repeats a batch.
                journal.write_text(str(count))
    partial.replace(out)
    journal.unlink(missing_ok=True)
    return done


def _as_written_today(setting: Any) -> Any:
    return "patch" if setting == "default" else setting  # before one word stood for both


def _bytes_per_image(encoder: VisionEncoder, dtype: torch.dtype) -> int:
    return encoder.num_patches * encoder.hidden_size * dtype.itemsize


def _header(
    encoder: VisionEncoder,
    names: Sequence[str],
    dtype: torch.dtype,
    view: Mapping[str, object],
    given: Mapping[str, str],
) -> bytes:
    """safetensors' header for all images; their rows are then appended in order."""
    settings = {name: json.dumps(getattr(encoder.config, name)) for name in _SETTINGS}
    metadata = {**given, **settings}
    metadata["names"] = json.dumps(list(names))
    metadata["synthesized"] = json.dumps(encoder.synthesized)
    if chosen := {name: value for name, value in view.items() if value is not None}:
        metadata["view"] = json.dumps(chosen)
    tensor = {
        "dtype": _DTYPES[dtype],
        "shape": [len(names), encoder.num_patches, encoder.hidden_size],
        "data_offsets": [0, _bytes_per_image(encoder, dtype) * len(names)],
    }
    text = json.dumps({"__metadata__": metadata, "patch_tokens": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _prepare(partial: Path, journal: Path, header: bytes, num_bytes: int) -> int:
    """Create the partial file, or check that it is of the same work; how many images are done."""
    if not partial.exists():
        with partial.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + num_bytes)
        journal.write_text("0")
        return 0
    with partial.open("rb") as file:
        is_same = (
            file.read(len(header)) == header and partial.stat().st_size == len(header) + num_bytes
        )
    if not is_same:
        raise FileExistsError(
            f"{partial} is unfinished work on other images or with another tower; delete it to "
            "start anew."
        )
    return int(journal.read_text()) if journal.exists() else 0

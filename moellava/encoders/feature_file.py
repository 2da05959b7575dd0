"""Image files → one safetensors file of patch tokens, and back.

encode_files        writes it; a killed run is resumed
FeatureFile         reads it, one image at a time
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from moellava.encoders.base import VisionEncoder
from moellava.encoders.batches import encode_batches, pixels_of
from moellava.encoders.precision import in_precision
from moellava.images import ImageLike, to_pil
from moellava.storage.errors import reading
from moellava.storage.locking import locked
from moellava.storage.weights import weights_fingerprint
from moellava.storage.writing import replacing

TOKENS, NAMES, PRECISION = "patch_tokens", "names", "precision"
MOST_NAMES_IN_HEADER = 2**24  # bytes; safetensors refuses headers of more than 100 MB
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

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with reading(path, "a file of features"), safe_open(path, framework="pt") as file:
            self.metadata: dict[str, str] = file.metadata() or {}
            if NAMES in file.keys():  # noqa: SIM118  (not a mapping: it has keys() alone)
                names = json.loads(bytes(file.get_tensor(NAMES).tolist()))
            else:
                names = json.loads(self.metadata[NAMES])
            num_rows = file.get_slice(TOKENS).get_shape()[0]
            if num_rows != len(names):
                raise ValueError(f"{len(names)} names for {num_rows} images")
        self._row_of = {str(name): row for row, name in enumerate(names)}
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

    @property
    def precision(self) -> str:
        """What the tower ran in, such as `bfloat16`; the tokens may be stored as something else."""
        return self.metadata.get(PRECISION) or _dtype_name(self.dtype)

    def tokens(self, name: str) -> Tensor:
        """Patch tokens (N, D) of one image."""
        if name not in self._row_of:
            raise ValueError(
                f"{self.path} has no features of the image {name}. Delete the file to encode anew."
            )
        with reading(self.path, "a file of features"):
            return self._open()[self._row_of[name]]

    def require_encoder(self, encoder: VisionEncoder) -> None:
        """Raise `ValueError` unless the file was written with an encoder of these settings."""
        for name in _SETTINGS:
            with reading(self.path, "a file of features"):
                found = json.loads(self.metadata[name])
            wanted = getattr(encoder.config, name)
            if _as_written_today(found) != wanted:
                raise ValueError(
                    f"{self.path} holds features of {name}={found!r}, but the model has "
                    f"{wanted!r}. Delete the file to encode anew, or choose another file."
                )

    def _open(self) -> _Rows:
        if self._rows is None:  # opened in the process that reads
            self._rows = safe_open(self.path, framework="pt").get_slice(TOKENS)
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
    precision: str | None = None,
    dtype: torch.dtype | None = None,
    load_image: Callable[..., Image.Image] = to_pil,
    view: Mapping[str, object] | None = None,
    to_pixels: Callable[[Sequence[tuple[ImageLike, int]]], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write `patch_tokens` (images, N, D) of image files, and their names, to a safetensors file.

    Memory is that of a batch, however many images. Work in progress lies in `<out>.partial`; a
    later call with the same images and weights resumes it. The file's metadata has the names (if
    they are many, a tensor `names` has them, as JSON), the tower's settings and the view.

    Args:
        paths: whatever `load_image` takes; several times if its views have names of their own.
        precision: what the tower runs in, as in `VisionEncoder.encode`; the file remembers it.
        dtype: what is stored; the precision if not given.
        view: options of `moellava.images.View`, such as `window`.
        to_pixels: pixel values (B, 3, H, W) of a batch of images, each with its place in `paths`;
            in place of `load_image` and the encoder's image processor.
        metadata: kept in the file as it is.

    Returns:
        How many images an earlier, interrupted call had done.

    Raises:
        FileExistsError: `out` exists, or the unfinished work is of other images, of another tower,
            or in another precision.
        OSError: another process writes the same file.
        ValueError: an image cannot be read; its file is named. The images before it are kept.
    """
    if not paths:
        raise ValueError("There are no images to encode.")
    encoder = in_precision(encoder, precision)
    dtype = dtype or encoder.dtype
    with locked(out):
        if out.exists():
            raise FileExistsError(f"{out} already exists; give another name or delete it.")
        header = _header(encoder, paths, names, dtype, view or {}, metadata or {})
        partial = out.with_name(f"{out.name}.partial")
        done = _prepare(partial, header, _bytes_per_image(encoder, dtype), len(paths))
        if done < len(paths):
            load = functools.partial(load_image, **(view or {}))
            batches = encode_batches(
                encoder,
                list(zip(paths, range(len(paths)), strict=True))[done:],
                batch_size=batch_size,
                progress=progress,
                to_pixels=to_pixels
                or (lambda own: pixels_of(encoder, [path for path, _ in own], load_image=load)),
            )
            with partial.open("ab") as file:
                for tokens in batches:
                    file.write(tokens.to(dtype).contiguous().cpu().view(torch.uint8).numpy().data)
                    file.flush()
                os.fsync(file.fileno())
        partial.replace(out)
    return done


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_written_today(setting: object) -> object:
    return "patch" if setting == "default" else setting  # before one word stood for both


def _bytes_per_image(encoder: VisionEncoder, dtype: torch.dtype) -> int:
    return encoder.num_patches * encoder.hidden_size * dtype.itemsize


def _header(
    encoder: VisionEncoder,
    paths: Sequence[ImageLike],
    names: Sequence[str],
    dtype: torch.dtype,
    view: Mapping[str, object],
    given: Mapping[str, str],
) -> bytes:
    """What stands before the tokens: safetensors' header for all images, and many names."""
    settings = {name: json.dumps(getattr(encoder.config, name)) for name in _SETTINGS}
    metadata = {**given, **settings}
    metadata["synthesized"] = json.dumps(encoder.synthesized)
    metadata.setdefault("weights", str(weights_fingerprint(encoder.state_dict())))
    metadata.setdefault(PRECISION, _dtype_name(encoder.dtype))
    metadata["images"] = _fingerprint(paths)
    if chosen := {name: value for name, value in view.items() if value is not None}:
        metadata["view"] = json.dumps(chosen)
    text = json.dumps(list(names))
    tensors, before = {}, b""
    if len(text) > MOST_NAMES_IN_HEADER:
        before = text.encode() + b" " * (-len(text) % 64)
        offsets = [0, len(before)]
        tensors[NAMES] = {"dtype": "U8", "shape": [len(before)], "data_offsets": offsets}
    else:
        metadata[NAMES] = text
    num_bytes = _bytes_per_image(encoder, dtype) * len(names)
    tensors[TOKENS] = {
        "dtype": _DTYPES[dtype],
        "shape": [len(names), encoder.num_patches, encoder.hidden_size],
        "data_offsets": [len(before), len(before) + num_bytes],
    }
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + before


def _fingerprint(images: Sequence[ImageLike]) -> str:
    """SHA-256 over sizes and dates of files: two folders may have the same names."""
    digest = hashlib.sha256()
    for image in images:
        if isinstance(image, str | os.PathLike) and os.path.exists(image):
            facts = os.stat(image)
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
        else:
            digest.update(b"-\n")  # its name says which it is, or the reading says what is wrong
    return digest.hexdigest()


def _prepare(partial: Path, header: bytes, bytes_per_image: int, num_images: int) -> int:
    """Write the header, or check that the partial file has it; how many whole images follow it."""
    if not partial.exists():
        with replacing(partial) as part:
            part.write_bytes(header)
        return 0
    with partial.open("rb+") as file:
        is_same = file.read(len(header)) == header
        num_bytes = partial.stat().st_size - len(header)
        if not is_same or num_bytes > bytes_per_image * num_images:
            raise FileExistsError(
                f"{partial} is unfinished work on other images or with another tower, or in "
                "another precision; delete it to start anew."
            )
        done = num_bytes // bytes_per_image
        file.truncate(len(header) + done * bytes_per_image)  # a kill may have cut an image in two
    return done

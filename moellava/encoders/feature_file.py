"""Image files → one safetensors file of patch tokens, resumable after a kill: `encode_files`."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moellava.encoders.base import VisionEncoder
from moellava.encoders.batches import encode_batches
from moellava.images import to_pil

# safetensors' words for the dtypes that a tower can have.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def encode_files(
    encoder: VisionEncoder,
    paths: Sequence[Any],
    names: Sequence[str],
    out: Path,
    *,
    batch_size: int = 16,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    load_image: Callable[[Any], Image.Image] = to_pil,
    view: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write `patch_tokens` (images, N, D) of image files, and their names, to a safetensors file.

    Work in progress lies in `<out>.partial`, which a later call with the same images and tower
    continues. Names, the tower and the `view`, options of `moellava.images.View` such as `window`,
    stand in the file's metadata. Memory is that of a batch, however many images. `paths` may hold
    whatever `load_image` takes. `dtype` is what is stored; None is the encoder's. `metadata` is
    kept in the file as it is.

    Returns:
        How many images an earlier, interrupted call had done.
    Raises:
        FileExistsError: `out` is there already, or the unfinished work is of other images or
            another tower.
        ValueError: an image cannot be read; its file is named. The images before it are kept.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another name or delete it.")
    if not paths:
        raise ValueError("There are no images to encode.")
    partial, journal = (
        out.with_name(out.name + ".partial"),
        out.with_name(out.name + ".partial.done"),
    )
    dtype = dtype or encoder.dtype
    header, num_bytes = _header(encoder, names, dtype, view or {}, metadata or {})
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
                journal.write_text(
                    str(count)
                )  # after the data: a kill in between only repeats a batch
    partial.replace(out)
    journal.unlink(missing_ok=True)
    return done


def _header(
    encoder: VisionEncoder,
    names: Sequence[str],
    dtype: torch.dtype,
    view: Mapping[str, Any],
    given: Mapping[str, str],
) -> tuple[bytes, int]:
    """safetensors' header for all images, and the bytes of one: rows are then appended in order."""
    config = encoder.config
    shape = [len(names), encoder.num_patches, encoder.hidden_size]
    num_bytes = encoder.num_patches * encoder.hidden_size * dtype.itemsize
    settings = (
        "tower",
        "revision",
        "grid",
        "image_size",
        "select_layer",
        "select_feature",
        "final_norm",
    )
    metadata = {**given, **{name: json.dumps(getattr(config, name)) for name in settings}}
    metadata["names"] = json.dumps(list(names))
    metadata["synthesized"] = json.dumps(encoder.synthesized)
    if chosen := {name: value for name, value in view.items() if value is not None}:
        metadata["view"] = json.dumps(chosen)
    tensor = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [0, num_bytes * len(names)]}
    text = json.dumps({"__metadata__": metadata, "patch_tokens": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, num_bytes


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

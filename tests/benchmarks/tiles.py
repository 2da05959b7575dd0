"""Tiles: preprocessing against decoding the file, seven views in a batch against plain images.

    python -m tests.benchmarks.tiles

Every number is a ratio to a rival measured in the same run, in turns with it.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moellava.images import to_pil
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from tests.benchmarks.data import compressed_file, in_turns, large_file, row

SIDE = 3000
NUM_VIEWS = 7


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        description = {
            "model_name_or_path": str(write_tinyllama(folder / "llama")),
            "mm_vision_tower": str(write_biomedclip(folder / "biomedclip")),
            "projector_type": "pixel_shuffle",
        }
        plain = load_pretrained_model(description, dtype="float32")
        plain.processor.set_tiling({"max_tiles": 6, "grids": [[2, 3]]})
        print("| 3,000 x 3,000 of 16 bits, ms | to seven views | decoded to 8 bits | ratio |")
        print("|---|---|---|---|")
        native = large_file(folder, SIDE)
        files = {"uncompressed": native, "JPEG 2000": compressed_file(native)}
        for name, path in files.items():

            def views(path: str = path) -> torch.Tensor:
                pixels = plain.processor.pixel_values([to_pil(path)])
                assert len(pixels) == NUM_VIEWS
                return pixels

            row(name, *in_turns(views, partial(to_pil, path), 8))

        print("| views/s | of tiled images | of plain images | ratio of times |")
        print("|---|---|---|---|")
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (448, 672, 3), dtype=np.uint8))
        tiles = plain.processor.pixel_values([picture])
        assert len(tiles) == NUM_VIEWS
        alone = torch.randn(NUM_VIEWS, 3, 224, 224)
        with torch.inference_mode():
            features = plain.model.get_image_features
            row("7 views, ms", *in_turns(partial(features, tiles), partial(features, alone), 12))


if __name__ == "__main__":
    main()

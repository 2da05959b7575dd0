"""A large image → tiles of the tower's own size: `Tiling`, its grid, and where tiles are cut."""

from dataclasses import dataclass

from PIL import Image, ImageOps
from transformers.image_processing_utils import select_best_resolution

from moellava.messages import unknown_name
from moellava.storage.limits import require_within

RULES = ("llava_next", "internvl")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How an image becomes several views, each of which the tower sees like an image of its own.

    Args:
        max_tiles: most tiles of an image, without the overview; 2 or more.
        overview: whether the whole image, seen as it is without tiling, comes before the tiles.
        rule: what chooses the grid, see `choose_grid`.

    Raises:
        ValueError: for a number of tiles or a rule that there is not.
    """

    max_tiles: int = 6
    overview: bool = True
    rule: str = "llava_next"

    def __post_init__(self) -> None:
        if self.max_tiles < 2:
            raise ValueError(
                f"max_tiles of tiling is {self.max_tiles}; give 2 or more, such as 6. Leave tiling "
                "out for one view of each image."
            )
        require_within("tiles", self.max_tiles, "max_tiles of tiling")
        if self.rule not in RULES:
            raise unknown_name("rule of tiling", self.rule, RULES)

    def choose_grid(self, width: int, height: int, tile: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tiles of an image; (1, 1) is an image that stays one view.

        Both rules are transformers' own code, over all grids of at most `max_tiles` tiles:

        - `llava_next` (arXiv 2310.03744 v2, LLaVA-NeXT): the grid on whose canvas the image, its
          aspect ratio kept, keeps most of its pixels; of those the one that wastes least. An image
          that a tile holds stays one view.
        - `internvl` (arXiv 2404.16821): the grid whose aspect ratio is nearest; of equal ones the
          largest that has less than twice the image's pixels.

        Args:
            width, height: of the image, in pixels.
            tile: height and width of a tile.
        """
        rows, columns = tile
        if self.rule == "internvl":
            # Imported when it is needed: a model's module of transformers.
            from transformers.models.got_ocr2.image_processing_got_ocr2 import (
                get_optimal_tiled_canvas,
            )

            across, down = get_optimal_tiled_canvas((height, width), tile, 1, self.max_tiles)
            return down, across
        sizes = sorted(
            (
                (down * rows, across * columns)
                for down in range(1, self.max_tiles + 1)
                for across in range(1, self.max_tiles // down + 1)
            ),
            key=lambda size: size[0] * size[1],
        )
        # None for an image so narrow that no canvas keeps a pixel of its width.
        best = select_best_resolution((height, width), sizes) or tile
        return best[0] // rows, best[1] // columns

    def __str__(self) -> str:
        overview = " and an overview" if self.overview else ""
        return f"up to {self.max_tiles} tiles{overview} of each image"

    def layout(self, grid: tuple[int, int], image_token: str) -> str:
        """The text that stands for an image: a mark for each view, a line for each row of tiles."""
        rows, columns = grid
        if rows * columns == 1:
            return image_token
        lines = [image_token] if self.overview else []
        return "\n".join([*lines, *[image_token * columns] * rows])


def tile_boxes(
    size: tuple[int, int], grid: tuple[int, int], tile: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """What each tile shows of an image, row by row.

    Args:
        size: width and height of the image, in pixels.
        grid: rows and columns of tiles.
        tile: height and width of a tile.

    Returns:
        left, upper, right, lower in pixels of the image, which may lie outside it: the image stands
        in the middle of the canvas.
    """
    (width, height), (rows, columns) = size, grid
    scale = min(columns * tile[1] / width, rows * tile[0] / height)
    left = (columns * tile[1] / scale - width) / 2
    upper = (rows * tile[0] / scale - height) / 2
    across, down = tile[1] / scale, tile[0] / scale
    return [
        (
            column * across - left,
            row * down - upper,
            (column + 1) * across - left,
            (row + 1) * down - upper,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def cut_tiles(
    picture: Image.Image, grid: tuple[int, int], tile: tuple[int, int]
) -> list[Image.Image]:
    """The tiles of an RGB image, row by row.

    The image is scaled to the canvas of the grid with its aspect ratio kept (bicubic) and stands in
    its middle; what is left over is black.
    """
    (rows, columns), (height, width) = grid, tile
    canvas = ImageOps.pad(picture, (columns * width, rows * height), Image.Resampling.BICUBIC)
    return [
        canvas.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        for row in range(rows)
        for column in range(columns)
    ]

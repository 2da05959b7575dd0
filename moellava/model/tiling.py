"""A large image → tiles of the tower's own size, and what stands for them in a prompt.

| name | what it gives |
|---|---|
| `Tiling` | the settings; its `choose_grid` and `layout` |
| `Layout` | the text of an image, and how many placeholders and views belong to it |
| `tile_boxes`, `cut_tiles` | where tiles lie, and the tiles |
| `merge_unpadded` | the tokens of a LLaVA-NeXT's image, of those of its views |
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from moellava.messages import unknown_name
from moellava.storage.limits import require_within

RULES = ("llava_next", "internvl")
MERGES = ("flat", "joint", "spatial_unpad")


@dataclass(frozen=True)
class Layout:
    """What stands for an image in a prompt.

    Args:
        text: a mark for each run of placeholders, which stands for as many image embeddings; with
            tiles whose rows are told apart, a line for each row.
        num_marks: how many marks that are.
        tokens_per_mark: placeholders of each.
        num_views: pictures that the tower sees.
    """

    text: str
    num_marks: int
    tokens_per_mark: int
    num_views: int

    @property
    def num_tokens(self) -> int:
        """All placeholders."""
        return self.num_marks * self.tokens_per_mark


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How an image becomes several views, each of which the tower sees like an image of its own.

    Args:
        max_tiles: most tiles of an image, without the overview; 2 or more.
        overview: whether the whole image, seen as it is without tiling, comes before the tiles.
        rule: what chooses the grid, see `choose_grid`.
        merge: how views become tokens. `flat`: each view has its own, and a line break in the text
            stands between rows of tiles. `joint`: a projector with queries (`perceiver`, `qformer`)
            sees the patches of all views and gives as many tokens as it gives for one; it is not
            told which patch is of which view. `spatial_unpad`: LLaVA-NeXT's, see
            `merge_unpadded`; read from its checkpoints, and not to be asked for.
        grids: rows and columns of the tiles that may be chosen; None is all of `max_tiles` or less.
            With `grids`, no image stays one view.

    Raises:
        ValueError: for a number of tiles, a rule or a merge that there is not.
    """

    max_tiles: int = 6
    overview: bool = True
    rule: str = "llava_next"
    merge: str = "flat"
    grids: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.max_tiles < 2:
            raise ValueError(
                f"max_tiles of tiling is {self.max_tiles}; give 2 or more, such as 6. Leave tiling "
                "out for one view of each image."
            )
        require_within("tiles", self.max_tiles, "max_tiles of tiling")
        if self.rule not in RULES:
            raise unknown_name("rule of tiling", self.rule, RULES)
        if self.merge not in MERGES:
            raise unknown_name("merge of tiling", self.merge, MERGES)
        if self.grids is not None:
            self._require_grids(self.grids)

    def _require_grids(self, grids: tuple[tuple[int, int], ...]) -> None:
        if not grids or any(min(grid) < 1 or math.prod(grid) > self.max_tiles for grid in grids):
            raise ValueError(
                f"grids of tiling are {[list(grid) for grid in grids]}; expected rows and columns "
                f"of at most max_tiles={self.max_tiles} tiles, such as [[1, 2], [2, 2]]."
            )
        if self.rule != "llava_next":
            raise ValueError("grids of tiling need the rule llava_next. Leave one of them out.")

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
        grids = self.grids or sorted(
            (
                (down, across)
                for down in range(1, self.max_tiles + 1)
                for across in range(1, self.max_tiles // down + 1)
            ),
            key=math.prod,
        )
        sizes = [(down * rows, across * columns) for down, across in grids]
        best: tuple[int, int] = select_best_resolution((height, width), sizes)
        return best[0] // rows, best[1] // columns

    def num_views(self, grid: tuple[int, int]) -> int:
        """Pictures that the tower sees of an image with this grid of tiles."""
        is_whole = grid == (1, 1) and self.grids is None
        return 1 if is_whole else math.prod(grid) + self.overview

    def __str__(self) -> str:
        overview = " and an overview" if self.overview else ""
        return f"up to {self.max_tiles} tiles{overview} of each image"

    def layout(
        self, size: tuple[int, int], grid: tuple[int, int], image_token: str, num_tokens: int
    ) -> Layout:
        """What stands for an image.

        Args:
            size: width and height of the image, in pixels.
            grid: rows and columns of its tiles.
            image_token: the mark.
            num_tokens: that the projector makes of one view.
        """
        num_views = self.num_views(grid)
        if self.merge == "spatial_unpad":
            rows, columns = unpadded_grid(size, grid, math.isqrt(num_tokens))
            return Layout(image_token, 1, num_tokens + rows * (columns + 1), num_views)
        if self.merge == "joint" or num_views == 1:
            return Layout(image_token, 1, num_tokens, num_views)
        rows, columns = grid
        lines = [image_token] if self.overview else []
        text = "\n".join([*lines, *[image_token * columns] * rows])
        return Layout(text, num_views, num_tokens, num_views)


def unpadded_grid(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of patches of a grid of tiles that show the image, not the padding.

    Args:
        size: width and height of the image, in pixels.
        side: patches along one edge of a tile.
    """
    canvas = torch.empty(1, grid[0] * side, grid[1] * side, device="meta")
    rows, columns = _unpad(canvas, size).shape[1:]
    return rows, columns


def merge_unpadded(
    views: Tensor, size: tuple[int, int], grid: tuple[int, int], newline: Tensor
) -> Tensor:
    """One sequence of an image's views: LLaVA-NeXT's `spatial_unpad`.

    The overview's tokens come first. Those of the tiles are laid side by side, as the tiles lie;
    rows and columns that show padding alone are left out, and `newline` ends each row.

    Args:
        views: (1 + rows * columns, side * side, D), the overview and the tiles row by row.
        size: width and height of the image, in pixels.
        grid: rows and columns of tiles.
        newline: (D,), learned.

    Returns:
        (N, D).
    """
    side, width = math.isqrt(views.shape[1]), views.shape[2]
    tiles = views[1:].reshape(*grid, side, side, width)
    canvas = tiles.permute(4, 0, 2, 1, 3).reshape(width, grid[0] * side, grid[1] * side)
    shown = _unpad(canvas, size)  # (D, rows, columns)
    ends = newline.to(shown)[:, None, None].expand(width, shown.shape[1], 1)
    lines = torch.cat([shown, ends], dim=-1).flatten(1).T
    return torch.cat([views[0], lines])


def _unpad(canvas: Tensor, size: tuple[int, int]) -> Tensor:
    # Imported when it is needed: a model's module of transformers.
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    width, height = size
    shown: Tensor = unpad_image(canvas, (height, width))
    return shown


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
    """The tiles of a grey or RGB image, row by row, in RGB.

    The image is scaled to the canvas of the grid with its aspect ratio kept (bicubic) and stands in
    its middle; what is left over is black.
    """
    (rows, columns), (height, width) = grid, tile
    canvas = ImageOps.pad(picture, (columns * width, rows * height), Image.Resampling.BICUBIC)
    return [
        canvas.crop(
            (column * width, row * height, (column + 1) * width, (row + 1) * height)
        ).convert("RGB")
        for row in range(rows)
        for column in range(columns)
    ]

"""`Explanation`: the record of one answer, as arrays, and the pictures that are drawn from it.

Letters: A answer tokens, I images, N image tokens of one image, L layers, H heads,
R x C blocks of pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moellava.explain.drawing import overlays, routes
from moellava.explain.frames import Frame
from moellava.explain.grids import TokenGrid
from moellava.explain.routing import Routing
from moellava.messages import unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]

# What a map shows, for titles.
KINDS = {
    "attention": "attention to the image",
    "rollout": "attention rollout",
    "ablation": "log-probability lost without the block (nats)",
    "gradient": "gradient x input (nats)",
}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the model looked at and which experts worked while it gave one answer.

    Args:
        question, answer: as asked and given.
        tokens: A texts, which joined are the answer.
        logprobs: (A,) natural logarithm of each token's probability.
        pictures: I pictures as they were given, in 8-bit colour. With tiling, I counts views: a
            picture stands once for each of its own.
        frames: of each picture, the part that the model saw.
        grid: places of the N image tokens, or None with the reason in `no_grid`.
        attention: (L, H, A, I * N) float32, of the query that chose each token to each image token.
        rollout: (A, I * N) float32.
        blank_attention, blank_rollout: the same for the same answer over blank images.
        ablation: (A, I, R, C) float32, in nats, or None if it was not asked for.
        gradient: (I, R, C) float32, in nats, or None if it was not asked for.
        routing: of every token; None for a language model without moellava's experts.
        tile_grids: of each picture as given, rows and columns of its tiles; (1, 1) without tiling.
        num_views: of each picture as given; one more than its tiles if an overview comes before.
    """

    question: str
    answer: str
    tokens: tuple[str, ...]
    logprobs: Array
    pictures: tuple[Image.Image, ...]
    frames: tuple[Frame, ...]
    grid: TokenGrid | None
    no_grid: str | None
    attention: Array
    rollout: Array
    blank_attention: Array | None
    blank_rollout: Array | None
    ablation: Array | None
    gradient: Array | None
    routing: Routing | None
    tile_grids: tuple[tuple[int, int], ...] = ()
    num_views: tuple[int, ...] = ()

    def map(
        self,
        kind: str = "attention",
        *,
        token: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        image: int = 0,
        blank: bool = False,
    ) -> Array:
        """One map of an image, (rows, columns) float32.

        Args:
            kind: a name of `KINDS`.
            token: of the answer; by default the mean of attention and rollout over all tokens, and
                the sum of the ablation.
            layer, head: of the attention; by default the mean over all.
            image: which one, from 0.
            blank: of the blank image in its place.

        Raises:
            ValueError: for a map that was not asked for, or that has no places.
        """
        if kind not in KINDS:
            raise unknown_name("map", kind, KINDS)
        if kind != "attention" and (layer is not None or head is not None):
            raise ValueError(f"layer and head are of 'attention'; the {kind} map has none.")
        if kind in ("attention", "rollout"):
            return self._token_map(kind, token, layer, head, image, blank)
        if blank:
            raise ValueError(
                f"The {kind} map compares with the blank image; it has none of its own."
            )
        if kind == "gradient":
            if token is not None:
                raise ValueError("The gradient map is that of the whole answer; leave token out.")
            return np.asarray(self._given(self.gradient, kind)[image])
        effects = self._given(self.ablation, kind)[:, image]
        result: Array = effects.sum(0) if token is None else effects[token]
        return result

    def _token_map(
        self,
        kind: str,
        token: int | None,
        layer: int | None,
        head: int | None,
        image: int,
        blank: bool,
    ) -> Array:
        if self.grid is None:
            raise ValueError(self.no_grid)
        if kind == "attention":
            every = self._given(self.blank_attention if blank else self.attention, "blank")
            every = every[slice(None) if layer is None else [layer]]
            values: Array = every[:, slice(None) if head is None else [head]].mean((0, 1))
        else:
            values = self._given(self.blank_rollout if blank else self.rollout, "blank")
        values = np.asarray(values.mean(0) if token is None else values[token])  # (I * N,)
        num_tokens = values.shape[-1] // len(self.pictures)
        return self.grid.maps(values[image * num_tokens : (image + 1) * num_tokens])

    def _given(self, values: Array | None, name: str) -> Array:
        if values is None:
            raise ValueError(f"This explanation has no {name} map. Type: explain(..., {name}=True)")
        return values

    def on_picture(self, values: Array, image: int = 0, *, smooth: bool = False) -> Array:
        """A map on the original picture, (H, W); NaN where the model saw nothing."""
        return self.frames[image].place(values, smooth=smooth)

    def stitched(
        self,
        kind: str = "attention",
        *,
        token: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        picture: int = 0,
        blank: bool = False,
    ) -> tuple[Array, Frame]:
        """The maps of all tiles of one picture as one map, as the tiles lie, and where it lies.

        Args:
            picture: which one of those given, from 0; others are those of `map`.

        Raises:
            ValueError: for a picture that has no tiles, and as `map`.
        """
        rows, columns = self.tile_grids[picture]
        if rows * columns == 1:
            raise ValueError(f"Picture {picture} has one view, and no tiles. Use map().")
        end = sum(self.num_views[: picture + 1])
        tiles = range(end - rows * columns, end)
        maps = [
            self.map(kind, token=token, layer=layer, head=head, image=tile, blank=blank)
            for tile in tiles
        ]
        whole = np.block([maps[row * columns : (row + 1) * columns] for row in range(rows)])
        first, last = self.frames[tiles[0]], self.frames[tiles[-1]]
        return whole, replace(first, right=last.right, bottom=last.bottom)

    def image_share(self) -> Array:
        """(L, H): the share of the attention that goes to image tokens, mean over answer tokens."""
        share: Array = self.attention.sum(-1).mean(-1)
        return share

    # ---- pictures ----

    def draw_overlay(
        self,
        path: Path | str | None = None,
        *,
        kind: str = "attention",
        token: int | None = None,
        layer: int | None = None,
        head: int | None = None,
        image: int = 0,
        stitched: bool = False,
        smooth: bool = False,
    ) -> "Figure":
        """The picture, the map on it, and the blank image's map beside it on one scale.

        Args are those of `map`; with `stitched`, the tiles of the picture number `image` are drawn
        as one map. The figure is also written to `path`.
        """
        has_blank = kind in ("attention", "rollout") and self.blank_attention is not None
        options: Any = {"token": token, "layer": layer, "head": head}
        blank = None
        if stitched:
            values, frame = self.stitched(kind, picture=image, **options)
            if has_blank:
                blank, _ = self.stitched(kind, picture=image, blank=True, **options)
            picture = self.pictures[sum(self.num_views[:image])]
        else:
            values, frame = self.map(kind, image=image, **options), self.frames[image]
            if has_blank:
                blank = self.map(kind, image=image, blank=True, **options)
            picture = self.pictures[image]
        chosen = [
            f"{name} {value}"
            for name, value in (("layer", layer), ("head", head))
            if value is not None
        ]
        what = ", ".join([KINDS[kind], *chosen])
        if token is not None:
            what += f", token {self.tokens[token]!r}"
        return overlays.draw_overlay(
            picture,
            frame,
            values,
            blank,
            title=f"{self.question} \N{RIGHTWARDS ARROW} {self.answer}",
            label=what,
            is_signed=kind in ("ablation", "gradient"),
            smooth=smooth,
            path=path,
        )

    def draw_tokens(
        self, path: Path | str | None = None, *, kind: str = "attention", image: int = 0
    ) -> "Figure":
        """The map of each answer token, on one scale; at most 16 tokens."""
        numbers = range(min(len(self.tokens), overlays.MAX_TOKENS))
        return overlays.draw_tokens(
            self.pictures[image],
            self.frames[image],
            [self.map(kind, token=number, image=image) for number in numbers],
            [
                f"{self.tokens[number].strip()!r}  p = {np.exp(self.logprobs[number]):.2f}"
                for number in numbers
            ],
            label=KINDS[kind],
            is_signed=kind == "ablation",
            path=path,
        )

    def draw_heads(self, path: Path | str | None = None) -> "Figure":
        """How much of its attention each layer and head gives to the image."""
        return overlays.draw_heads(self.image_share(), path=path)

    def draw_load(self, path: Path | str | None = None) -> "Figure":
        """The load of each expert per layer and phase, with counts and the even line."""
        return routes.draw_load(self._routing(), path=path)

    def draw_pathways(self, path: Path | str | None = None) -> "Figure":
        """How tokens travel from the experts of one sparse layer to those of the next."""
        return routes.draw_pathways(self._routing(), path=path)

    def _routing(self) -> Routing:
        if self.routing is None:
            raise ValueError(
                "This language model has no experts of moellava's, so there are no routes to draw."
            )
        return self.routing

    def to_dict(self) -> Mapping[str, object]:
        """All numbers, for pictures of one's own: plain Python values and numpy arrays."""
        names = ("attention", "rollout", "blank_attention", "blank_rollout", "ablation", "gradient")
        routing = None if self.routing is None else dict(vars(self.routing))
        return {
            "question": self.question,
            "answer": self.answer,
            "tokens": list(self.tokens),
            "logprobs": self.logprobs,
            "grid": None if self.grid is None else dict(vars(self.grid)),
            "no_grid": self.no_grid,
            "frames": [dict(vars(frame)) for frame in self.frames],
            "tile_grids": list(self.tile_grids),
            "num_views": list(self.num_views),
            **{name: getattr(self, name) for name in names},
            "routing": routing,
        }

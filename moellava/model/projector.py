"""Patch tokens (B, N, D_vision) → image embeddings (B, M, D_text) in the language model's space.

build_projector, num_projected_tokens   a projector by its type
register_projector                      adds a type; docs/add_a_projector.md is the guide
projectors                              all types: ours, and those of installed packages

Projectors with queries of their own (`perceiver`, `qformer`) are in `resamplers.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from moellava.messages import unknown_name
from moellava.plugins import load_plugins
from moellava.storage.limits import require_bounded, require_within

PLUGINS = "moellava.projectors"  # the entry-point group of packages that register projectors


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """What a projector stands between."""

    vision_width: int  # channels of a patch token, D_vision
    text_width: int  # channels of a token embedding, D_text
    num_patches: int  # N, with the class token if it is selected
    grid: tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True, kw_only=True)
class ProjectorKind:
    """One type of projector.

    Args:
        build: `build(shape, **options)` returns an untrained module.
        num_tokens: `num_tokens(shape, **options)` is the number of embeddings that it makes of an
            image.
        options: the names that both take, with their defaults; JSON values, since a saved model's
            config keeps them.
    """

    build: Callable[..., nn.Module]
    num_tokens: Callable[..., int]
    options: Mapping[str, object] = field(default_factory=dict)


def build_projector(
    projector_type: str, shape: ProjectorShape, options: Mapping[str, object] | None = None
) -> nn.Module:
    """Build an untrained projector, a module from (B, N, D_vision) to (B, M, D_text).

    Args:
        projector_type: `mlpNx_gelu` for N >= 1 (N linear layers with GELU between them;
            `mlp2x_gelu` is LLaVA-1.5's, and the keys are those of the original LLaVA's
            `mm_projector`), or a name of `projectors()`.
        options: of that type; what is left out has its default.

    Raises:
        ValueError: for an unknown type or option, or a shape that the projector cannot take.
    """
    return _kind(projector_type).build(shape, **projector_options(projector_type, options))


def num_projected_tokens(
    projector_type: str, shape: ProjectorShape, options: Mapping[str, object] | None = None
) -> int:
    """M, the image embeddings that the projector makes of one image."""
    return _kind(projector_type).num_tokens(shape, **projector_options(projector_type, options))


def projector_options(
    projector_type: str, given: Mapping[str, object] | None = None
) -> dict[str, object]:
    """The options of a projector type, those given in place of their defaults."""
    known = _kind(projector_type).options
    for name, value in (given or {}).items():
        if name not in known:
            raise unknown_name(f"option of projector {projector_type!r}:", name, known)
        default = known[name]
        if isinstance(default, bool | int | str) and type(value) is not type(default):
            raise ValueError(
                f"{name} of projector {projector_type!r} is {value!r}; expected "
                f"{type(default).__name__}, such as {default!r}."
            )
    options = {**known, **(given or {})}
    require_bounded(f"projector {projector_type!r}", options)
    return options


def register_projector(
    name: str,
    build: Callable[..., nn.Module],
    *,
    num_tokens: Callable[..., int] | None = None,
    options: Mapping[str, object] | None = None,
) -> None:
    """Add a projector type; it then works in `load_pretrained_model` and in saved models.

    An installed package registers its types by an entry point of the group `moellava.projectors`,
    the name of a function without arguments that calls this one.

    Args:
        build, num_tokens, options: as in `ProjectorKind`; without `num_tokens`, every patch token
            becomes one embedding.

    Raises:
        ValueError: if the name is taken.
    """
    if name in PROJECTORS:
        raise ValueError(f"The projector name {name!r} is taken; choose another.")
    PROJECTORS[name] = ProjectorKind(
        build=build, num_tokens=num_tokens or _keep_count, options=options or {}
    )


def projectors() -> Mapping[str, ProjectorKind]:
    """Every registered type by name, those of installed packages included."""
    load_plugins(PLUGINS)
    return PROJECTORS


class PixelShuffle(nn.Module):
    """Neighbouring patches become channels: (B, N, D) → (B, N / f², f² D).

    ViT-B/16's 196 tokens become 49. The order of the channels is that of Idefics3 (arXiv
    2408.12637) in transformers: row, column, channel.
    """

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor

    def forward(self, patch_tokens: Tensor) -> Tensor:
        (rows, columns), factor = self.grid, self.factor
        num_images, _, width = patch_tokens.shape
        blocks = patch_tokens.reshape(
            num_images, rows // factor, factor, columns // factor, factor, width
        )
        blocks = blocks.permute(0, 1, 3, 2, 4, 5)  # (B, rows/f, columns/f, f, f, D)
        return blocks.flatten(3).flatten(1, 2)


class AveragePool(nn.Module):
    """The mean of f × f neighbouring patches: (B, N, D) → (B, N / f², D)."""

    def __init__(self, grid: tuple[int, int], factor: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor

    def forward(self, patch_tokens: Tensor) -> Tensor:
        num_images, _, width = patch_tokens.shape
        image = patch_tokens.transpose(1, 2).reshape(num_images, width, *self.grid)
        return nn.functional.avg_pool2d(image, self.factor).flatten(2).transpose(1, 2)


def _kind(projector_type: str) -> ProjectorKind:
    known = projectors()
    if projector_type in known:
        return known[projector_type]
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", projector_type):
        num_layers = int(match.group(1)[:9])  # nine digits are too many in any case
        require_within("layers", num_layers, f"projector_type {projector_type[:30]!r}")
        return ProjectorKind(
            build=lambda shape: _mlp(num_layers, shape.vision_width, shape.text_width),
            num_tokens=_keep_count,
        )
    raise unknown_name("projector_type", projector_type, [*known, "mlp2x_gelu"])


def _keep_count(shape: ProjectorShape) -> int:
    return shape.num_patches


def _mlp(num_layers: int, width_in: int, width_out: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(num_layers - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def _build_identity(shape: ProjectorShape) -> nn.Module:
    if shape.vision_width != shape.text_width:
        raise ValueError(
            f"projector_type 'identity' keeps the width, but patch tokens have "
            f"{shape.vision_width} channels and the language model's embeddings "
            f"{shape.text_width}. Use projector_type='linear' or 'mlp2x_gelu'."
        )
    return nn.Identity()


def _build_linear(shape: ProjectorShape) -> nn.Module:
    return nn.Linear(shape.vision_width, shape.text_width)


def _build_pixel_shuffle(shape: ProjectorShape, factor: int) -> nn.Module:
    _merged_count(shape, factor)
    return nn.Sequential(
        PixelShuffle(shape.grid, factor),
        *_mlp(2, factor * factor * shape.vision_width, shape.text_width),
    )


def _build_average_pool(shape: ProjectorShape, factor: int) -> nn.Module:
    _merged_count(shape, factor)
    return nn.Sequential(
        AveragePool(shape.grid, factor), *_mlp(2, shape.vision_width, shape.text_width)
    )


def _merged_count(shape: ProjectorShape, factor: int) -> int:
    """Tokens left when blocks of factor × factor patches become one and cover the grid."""
    rows, columns = shape.grid
    if shape.num_patches != rows * columns:
        raise ValueError(
            f"This projector merges neighbours on the {rows}x{columns} grid, but the tower gives "
            f"{shape.num_patches} tokens, the class token among them. "
            "Use vision_feature_select_strategy='default'."
        )
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(
            f"factor is {factor}, which does not divide the {rows}x{columns} grid of patches. "
            "Use a common divisor of both, or another image_size."
        )
    return rows * columns // factor**2


def _build_perceiver(shape: ProjectorShape, num_latents: int, num_layers: int) -> nn.Module:
    # Imported when it is built: transformers' Idefics2 and BLIP-2 take seconds.
    from moellava.model.resamplers import PerceiverProjector

    return PerceiverProjector(shape.vision_width, shape.text_width, num_latents, num_layers)


def _build_qformer(
    shape: ProjectorShape, num_query_tokens: int, num_layers: int, hidden_size: int
) -> nn.Module:
    from moellava.model.resamplers import QFormerProjector

    return QFormerProjector(
        shape.vision_width, shape.text_width, num_query_tokens, num_layers, hidden_size
    )


PROJECTORS: dict[str, ProjectorKind] = {
    "identity": ProjectorKind(build=_build_identity, num_tokens=_keep_count),
    "linear": ProjectorKind(build=_build_linear, num_tokens=_keep_count),
    "pixel_shuffle": ProjectorKind(
        build=_build_pixel_shuffle, num_tokens=_merged_count, options={"factor": 2}
    ),
    "average_pool": ProjectorKind(
        build=_build_average_pool, num_tokens=_merged_count, options={"factor": 2}
    ),
    "perceiver": ProjectorKind(
        build=_build_perceiver,
        num_tokens=lambda shape, num_latents, num_layers: num_latents,
        options={"num_latents": 64, "num_layers": 3},  # Idefics2's
    ),
    "qformer": ProjectorKind(
        build=_build_qformer,
        num_tokens=lambda shape, num_query_tokens, num_layers, hidden_size: num_query_tokens,
        options={"num_query_tokens": 32, "num_layers": 12, "hidden_size": 768},  # BLIP-2's
    ),
}

"""What the commands that take images share: window, frame and plane of a DICOM or NIfTI file."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moellava.images import ViewOptions
    from moellava.images.view import Frame as FrameChoice
    from moellava.images.view import Window as WindowChoice

Window = Annotated[
    str | None,
    typer.Option(
        help="Grey values to show: lung, bone, brain, soft (CT), CENTER,WIDTH, full, or the number "
        "of one of the file's own windows. The file's own if not given."
    ),
]
Frame = Annotated[
    str | None,
    typer.Option(
        help="Frame or slice, from 0; grid, or such as grid:9, for several in one picture."
    ),
]
Plane = Annotated[
    str | None, typer.Option(help="Of a NIfTI volume: axial (if not given), coronal, sagittal.")
]


def view_options(window: str | None, frame: str | None, plane: str | None) -> "ViewOptions":
    """The options of `moellava.images.load_image`, checked; only those that were given."""
    from moellava.images import View

    given: ViewOptions = {}
    if window is not None:
        given["window"] = parse_window(window)
    if frame is not None:
        given["frame"] = parse_frame(frame)
    if plane is not None:
        given["plane"] = plane
    View(**given)
    return given


def parse_window(text: str) -> "WindowChoice":
    """`lung`, `full`, `40,400` (center, width), or `1` (the file's second).

    Raises:
        ValueError: numbers that are neither one whole number nor two.
    """
    if text.strip("-+0123456789.,eE "):
        return text  # a name, which `View` checks
    try:
        if "," not in text:
            return int(text)
        center, width = text.split(",")
        return float(center), float(width)
    except ValueError:
        raise ValueError(
            f"--window {text}: expected a preset, 'full', CENTER,WIDTH or a number."
        ) from None


def parse_frame(text: str) -> "FrameChoice":
    """A number, `grid`, or `grid:9`."""
    return int(text) if text.lstrip("-").isdigit() else text

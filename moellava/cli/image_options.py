"""What the commands that take images share: how a DICOM or NIfTI file or a slide is seen."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from moellava.images import PartOptions, ViewOptions
    from moellava.images.view import Frame as FrameChoice
    from moellava.images.view import Window as WindowChoice

Window = Annotated[
    str | None,
    typer.Option(
        help="Grey values to show: lung, bone, brain, soft, mediastinum (CT), CENTER,WIDTH, full, "
        "or the number of one of the file's own windows. The file's own if not given."
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

Slices = Annotated[
    str | None,
    typer.Option(
        help="Of a NIfTI volume or a folder with a DICOM series: show so many slices, each as an "
        "image; NUMBER, or NUMBER,FIRST,LAST."
    ),
]
Frames = Annotated[
    str | None, typer.Option(help="The same of a file of several frames, such as ultrasound.")
]
Channels = Annotated[
    str | None,
    typer.Option(help="Three presets of --window, one for each colour: lung,mediastinum,bone."),
]
SlideTiles = Annotated[
    int | None,
    typer.Option(help="Of a whole-slide image: its overview and so many tiles with tissue."),
]
Region = Annotated[
    str | None,
    typer.Option(
        help="Of a whole-slide image: X,Y,WIDTH,HEIGHT,LEVEL; X and Y in pixels of level 0."
    ),
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


def part_options(
    window: str | None,
    frame: str | None,
    plane: str | None,
    slices: str | None,
    frames: str | None,
    channels: str | None,
    slide_tiles: int | None = None,
    region: str | None = None,
) -> "PartOptions":
    """The options of `moellava.images.image_parts`; only those that were given."""
    given = cast("PartOptions", {**view_options(window, frame, plane)})
    if slices is not None:
        given["slices"] = parse_numbers(slices, "--slices")
    if frames is not None:
        given["frames"] = parse_numbers(frames, "--frames")
    if channels is not None:
        given["channels"] = channels.split(",")
    if slide_tiles is not None and region is not None:
        raise ValueError("--slide-tiles and --region are both given. Leave one of them out.")
    if slide_tiles is not None:
        given["slide"] = {"max_tiles": slide_tiles}
    if region is not None:
        given["slide"] = parse_region(region)
    return given


def parse_numbers(text: str, option: str) -> int | dict[str, object]:
    """`8`, or `8,100,300`: how many, and the range that they are taken from.

    Raises:
        ValueError: something else.
    """
    numbers = _whole_numbers(text)
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 3:
        return dict(zip(("num", "first", "last"), numbers, strict=True))
    raise ValueError(f"{option} {text}: expected NUMBER or NUMBER,FIRST,LAST.")


def parse_region(text: str) -> dict[str, object]:
    """`X,Y,WIDTH,HEIGHT,LEVEL` of a whole-slide image; level 0 if it is left out.

    Raises:
        ValueError: something else.
    """
    numbers = _whole_numbers(text)
    if len(numbers) not in (4, 5):
        raise ValueError(f"--region {text}: expected X,Y,WIDTH,HEIGHT,LEVEL.")
    return {"region": numbers[:4], "level": numbers[4] if len(numbers) == 5 else 0}


def _whole_numbers(text: str) -> list[int]:
    """Those of a list with commas; none if anything else is among them."""
    words = [word.strip() for word in text.split(",")]
    is_whole = all(word.removeprefix("-").isdigit() for word in words)
    return [int(word) for word in words] if is_whole else []


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

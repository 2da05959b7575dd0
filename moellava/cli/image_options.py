"""What the commands that take images share: which window, frame and plane of a DICOM or NIfTI file to show."""

from typing import Annotated, Any

import typer

Window = Annotated[
    str | None,
    typer.Option(
        help="Grey values to show: lung, bone, brain, soft (CT), CENTER,WIDTH, full, or the number of one of the "
        "file's own windows. The file's own where not given."
    ),
]
Frame = Annotated[
    str | None,
    typer.Option(
        help="Frame or slice, from 0; grid, or such as grid:9, for several in one picture."
    ),
]
Plane = Annotated[
    str | None, typer.Option(help="Of a NIfTI volume: axial (where not given), coronal, sagittal.")
]


def view_options(window: str | None, frame: str | None, plane: str | None) -> dict[str, Any]:
    """The options as `moellava.images.to_pil` takes them, checked; only those that were given."""
    from moellava.images import View, parse_frame, parse_window

    options: dict[str, Any] = {
        "window": parse_window(window),
        "frame": parse_frame(frame),
        "plane": plane,
    }
    given = {name: value for name, value in options.items() if value is not None}
    View(**given)
    return given

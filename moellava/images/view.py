"""What to show of an image: the window of grey values, the frame or slice, the limit of its size.

`View` (the checked options), `WINDOWS` (CT presets), and the steps from grey values to 8 bits.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moellava.messages import unknown_name
from moellava.storage.limits import require_within

logger = logging.getLogger(__name__)

# Center and width in Hounsfield units, as in radiology's reference works (Radiopaedia, "Windowing
# (CT)").
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-600, 1500),
    "bone": (400, 1800),
    "brain": (40, 80),
    "soft": (50, 400),
}
# The axis that a slice lies across, of right, anterior, superior.
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
# Pillow's own limit, beyond which it calls a file a decompression bomb.
MAX_PIXELS = 178_956_970
MAX_GRID = 16
PERCENTILES = (0.5, 99.5)

Window = str | int | tuple[float, float]
Frame = int | str


@dataclass(frozen=True, kw_only=True)
class View:
    """What to show of an image that holds more than 8 bits or more than one picture.

    Args:
        window: None is the file's own. A preset of `WINDOWS` (CT only); `(center, width)` in the
            file's units (Hounsfield units for CT); a number: which of the file's own windows, from
            0; "full": all values that the file could store.
        frame: a frame of a DICOM file or an animation, or a slice of a volume, from 0, negative
            from the end; "grid": up to 16 of them, evenly spaced, in one picture, "grid:9" up to 9.
            None is the middle one of a DICOM file or a volume (with a warning, once), and the first
            of an animation or TIFF.
        plane: of a volume's slices: "axial" (as None), "coronal" or "sagittal".
        volume: of a 4-D NIfTI file (time, contrast), from 0.
        max_pixels: larger pictures are refused before they are decoded.
    """

    window: Window | None = None
    frame: Frame | None = None
    plane: str | None = None
    volume: int = 0
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.plane is not None and self.plane not in PLANES:
            raise unknown_name("plane", self.plane, PLANES)
        window = self.window
        if isinstance(window, str) and window not in WINDOWS and window != "full":
            raise unknown_name("window", window, (*WINDOWS, "full"))
        if isinstance(window, tuple | list):
            if len(window) != 2 or not float(window[1]) >= 1:
                raise ValueError(
                    f"window is {window}; expected (center, width) with a width of at least 1."
                )
            object.__setattr__(self, "window", (float(window[0]), float(window[1])))
        elif isinstance(window, bool) or not isinstance(window, str | int | None):
            raise ValueError(
                f"window is {window!r}; expected a preset ({', '.join(WINDOWS)}), 'full', "
                "(center, width), or the number of one of the file's own windows."
            )
        if isinstance(self.frame, str):
            self.grid_size  # noqa: B018  # raises for text that is no grid

    @property
    def grid_size(self) -> int | None:
        """How many pictures a grid may have; None if one frame is asked for."""
        if not isinstance(self.frame, str):
            return None
        word, _, number = self.frame.partition(":")
        if word != "grid" or (number and not number.isdigit()) or number == "0":
            raise ValueError(
                f"frame is {self.frame!r}; expected a number, 'grid', or such as 'grid:9'."
            )
        return int(number) if number else MAX_GRID

    def limits(self) -> tuple[float, float] | None:
        """Center and width, if the window is given as such or by the name of a preset."""
        if isinstance(self.window, str):
            return WINDOWS.get(self.window)
        return self.window if isinstance(self.window, tuple) else None

    def frames(self, count: int, name: str, *, default: int | None = None) -> list[int]:
        """The numbers of the frames to show, of `count`; `default` stands for the middle one.

        Raises:
            ValueError: there is no such frame.
        """
        if (size := self.grid_size) is not None:
            places = np.linspace(0, count - 1, min(size, count)).round()
            return [int(place) for place in np.unique(places)]
        if self.frame is None:
            if default is None and count > 1:
                say_once(
                    "Of several frames or slices the middle one is taken; "
                    "choose with frame=, or frame='grid'."
                )
            return [count // 2 if default is None else default]
        assert isinstance(self.frame, int)
        if not -count <= self.frame < count:
            raise ValueError(f"{name} has no frame {self.frame}: it has {count}, 0 to {count - 1}.")
        return [self.frame % count]

    def refuse_plane(self, name: str) -> None:
        """Raise `ValueError` if a plane or a volume was asked for, of an image that has none."""
        if self.plane is not None or self.volume:
            raise ValueError(
                f"{name} is not a volume, which plane= and volume= are for. Leave them out."
            )

    def check_size(self, width: int, height: int, name: str) -> None:
        """Refuse a picture beyond the limit, or without pixels."""
        if width < 1 or height < 1:
            raise ValueError(f"{name} is {width}x{height} pixels; expected at least 1x1.")
        # Towers scale the shorter side to a fixed length, and the longer one with it.
        require_within("aspect", max(width, height) // min(width, height), name)
        if width * height > self.max_pixels:
            raise ValueError(
                f"{name} is {width}x{height} pixels, beyond the limit of {self.max_pixels:,}. "
                "Give it smaller, or raise max_pixels."
            )


def window_to_eight_bit(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Values below the window are 0, above it 255, linear between.

    That is DICOM's LINEAR_EXACT (PS3.3 C.11.2.1.3.2).
    """
    return range_to_eight_bit(values, center - width / 2, center + width / 2)


def percentile_to_eight_bit(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """The 0.5th to 99.5th percentile of the finite values (of `used`, if given) as 0 to 255."""
    values = np.asarray(values, dtype=np.float64)
    used = values if used is None else used
    used = used[np.isfinite(used)]
    low, high = np.percentile(used, PERCENTILES) if used.size else (0.0, 1.0)
    if high <= low:  # hardly anything but one value: what differs from it may be the picture
        low, high = (used.min(), used.max()) if used.size else (0.0, 1.0)
    return range_to_eight_bit(values, low, high)


def range_to_eight_bit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` as 0 and `high` as 255, rounded; what is not a number is 0."""
    scaled = (np.asarray(values, dtype=np.float64) - low) / ((high - low) or np.inf) * 255
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255, neginf=0), 0, 255)).astype(
        np.uint8
    )


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of a grid of so many pictures, as square as can be."""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def montage(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W[, 3]) pictures of one shape side by side, row by row; the rest of the grid is black."""
    if len(pictures) == 1:
        return pictures[0]
    rows, columns = grid_shape(len(pictures))
    height, width = pictures[0].shape[:2]
    grid = np.zeros((rows * height, columns * width, *pictures[0].shape[2:]), pictures[0].dtype)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top, left = row * height, column * width
        grid[top : top + height, left : left + width] = picture
    return grid


@functools.cache
def say_once(message: str) -> None:
    logger.warning(message)

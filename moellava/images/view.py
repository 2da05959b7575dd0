"""What to show of an image: the window of grey values, the frame or slice, the limit of its size.

`View` (the checked options), `WINDOWS` (CT presets), and the steps from grey values to 8 bits.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moellava.images.eight_bit import by_rows
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
    "mediastinum": (50, 350),
}
# The axis that a slice lies across, of right, anterior, superior.
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
# Pillow's own limit, beyond which it calls a file a decompression bomb.
MAX_PIXELS = 178_956_970
MAX_GRID = 16
PERCENTILES = (0.5, 99.5)
_BLOCK = 1 << 20  # values counted at a time

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
        channels: three windows in place of one: the picture is RGB, and each channel shows the same
            grey values through its own window, such as ("lung", "mediastinum", "bone").
    """

    window: Window | None = None
    frame: Frame | None = None
    plane: str | None = None
    volume: int = 0
    max_pixels: int = MAX_PIXELS
    channels: Sequence[Window] | None = None

    def __post_init__(self) -> None:
        if self.plane is not None and self.plane not in PLANES:
            raise unknown_name("plane", self.plane, PLANES)
        object.__setattr__(self, "window", _checked_window(self.window))
        if self.channels is not None:
            object.__setattr__(self, "channels", self._checked_channels())
        self.grid_size  # noqa: B018  # raises for text that is not a grid
        if isinstance(self.frame, bool) or not isinstance(self.frame, str | int | None):
            raise ValueError(
                f"frame is a {type(self.frame).__name__}; expected a whole number, 'grid', or such "
                "as 'grid:9'."
            )

    def _checked_channels(self) -> tuple[Window, ...]:
        if self.window is not None:
            raise ValueError("window and channels are both given. Leave one of them out.")
        is_list = isinstance(self.channels, Sequence) and not isinstance(self.channels, str)
        if self.channels is None or not is_list or len(self.channels) != 3:
            raise ValueError(
                f"channels is {self.channels!r}; expected three windows, such as "
                "('lung', 'mediastinum', 'bone')."
            )
        checked = tuple(_checked_window(window) for window in self.channels)
        if None in checked:
            raise ValueError("channels has a window that is None; expected three windows.")
        return tuple(window for window in checked if window is not None)

    @property
    def has_window(self) -> bool:
        """Whether greys are asked for that only an image without colours has."""
        return self.channels is not None or (self.window is not None and self.window != "full")

    def in_channels(self, show: "Callable[[View], np.ndarray]") -> np.ndarray:
        """What `show` gives for this view; with `channels`, its (H, W) of each, as (H, W, 3)."""
        if self.channels is None:
            return show(self)
        views = (replace(self, channels=None, window=window) for window in self.channels)
        return np.stack([show(view) for view in views], axis=-1)

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
        size = int(number) if number else MAX_GRID
        require_within("grid", size, f"frame={self.frame!r}")
        return size

    def limits(self) -> tuple[float, float] | None:
        """Center and width, if the window is given as such or by the name of a preset."""
        if isinstance(self.window, str):
            return WINDOWS.get(self.window)
        return self.window if isinstance(self.window, tuple) else None

    def refuse_preset(self, dtype: np.dtype, name: str) -> None:
        """Raise `ValueError` for a preset in Hounsfield units and values that have no sign."""
        if isinstance(self.window, str) and self.window != "full" and dtype.kind in "ub":
            raise ValueError(
                f"{name}: the window {self.window!r} is in Hounsfield units, and these values of "
                f"{8 * dtype.itemsize} bits have no sign. Give (center, width) in the image's own "
                "units, or leave window out."
            )

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


def _checked_window(window: object) -> Window | None:
    if window is None or (isinstance(window, int) and not isinstance(window, bool)):
        return window
    if isinstance(window, str):
        if window in WINDOWS or window == "full":
            return window
        presets = ", ".join(f"{name} {limits}" for name, limits in WINDOWS.items())
        raise ValueError(
            f"{unknown_name('window', window, (*WINDOWS, 'full'))} As (center, width) in "
            f"Hounsfield units: {presets}."
        )
    if not isinstance(window, tuple | list):
        raise ValueError(
            f"window is a {type(window).__name__}; expected a preset ({', '.join(WINDOWS)}), "
            "'full', (center, width), or the number of one of the file's own windows."
        )
    limits = tuple(map(float, window))
    if len(limits) != 2 or not (math.isfinite(sum(limits)) and limits[1] >= 1):
        raise ValueError(
            f"window is {window}; expected (center, width) with a width of at least 1."
        )
    return limits[0], limits[1]


def window_to_eight_bit(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Values below the window are 0, above it 255, linear between.

    That is DICOM's LINEAR_EXACT (PS3.3 C.11.2.1.3.2).
    """
    return range_to_eight_bit(values, center - width / 2, center + width / 2)


def percentile_range(values: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of the finite values, interpolated as NumPy does.

    Args:
        counts: how often each value occurs; None for once.
    """
    is_finite = np.isfinite(values)
    used = values[is_finite].astype(np.float64, copy=False)
    if not used.size:
        return 0.0, 1.0
    if counts is None:
        low, high = np.percentile(used, PERCENTILES)
    else:
        order = np.argsort(used)
        used, ends = used[order], np.cumsum(counts[is_finite][order])
        low, high = (_at(used, ends, share / 100 * (ends[-1] - 1)) for share in PERCENTILES)
    if high <= low:  # hardly anything but one value: what differs from it may be the picture
        low, high = used.min(), used.max()
    return float(low), float(high)


def _at(values: np.ndarray, ends: np.ndarray, rank: float) -> float:
    """The value at a rank among sorted values; `ends` is how many values end with each of them."""
    below, above = (
        values[np.searchsorted(ends, place, side="right")]
        for place in (math.floor(rank), math.ceil(rank))
    )
    return float(below + (above - below) * (rank - math.floor(rank)))


def value_counts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The values that occur among integers of 8 or 16 bits, and how often each does.

    Of other types: the values themselves, and None.
    """
    if values.dtype.kind not in "ui" or values.dtype.itemsize > 2:
        return values, None
    low, high = int(values.min()), int(values.max())
    counts = np.zeros(high - low + 1, np.int64)
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK):  # NumPy counts in 8 bytes for each value
        block = flat[start : start + _BLOCK].astype(np.int64) - low
        counts += np.bincount(block, minlength=len(counts))
    places = np.flatnonzero(counts)
    return places + low, counts[places]


def range_to_eight_bit(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` as 0 and `high` as 255, rounded; what is not a number is 0."""

    def scaled(rows: np.ndarray) -> np.ndarray:
        shares = (rows.astype(np.float64) - low) / ((high - low) or np.inf) * 255
        return np.rint(np.clip(np.nan_to_num(shares, nan=0.0, posinf=255, neginf=0), 0, 255))

    return by_rows(scaled, np.asarray(values))


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of a grid of so many pictures, as square as can be."""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def montage(pictures: Iterable[np.ndarray], count: int) -> np.ndarray:
    """(H, W[, 3]) pictures of one shape side by side, row by row; the rest of the grid is black.

    Only one of the pictures needs to be in memory at a time.
    """
    rows, columns = grid_shape(count)
    grid = np.zeros((0, 0), np.uint8)
    for index, picture in enumerate(pictures):
        if count == 1:
            return picture
        height, width = picture.shape[:2]
        if index == 0:
            grid = np.zeros((rows * height, columns * width, *picture.shape[2:]), picture.dtype)
        row, column = divmod(index, columns)
        top, left = row * height, column * width
        grid[top : top + height, left : left + width] = picture
    return grid


@functools.cache
def say_once(message: str) -> None:
    logger.warning(message)

"""Many images at once: `as_image_list` flattens them, `map_in_threads` works on all cores."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np

from moellava.images.image_like import ImageLike, Images, is_tensor

T = TypeVar("T")
R = TypeVar("R")


def as_image_list(images: Images) -> list[ImageLike]:
    """One image, a batch (4-D array) or a (nested) sequence of images as a flat list."""
    if (isinstance(images, np.ndarray) or is_tensor(images)) and images.ndim == 4:
        return list(images)
    if isinstance(images, list | tuple):
        return [image for item in images for image in as_image_list(item)]
    return [cast(ImageLike, images)]


def map_in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`[function(item) for item in items]` on as many threads as this process has cores."""
    items = list(items)
    num_threads = min(len(items), num_cores())
    if num_threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, items))


def num_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

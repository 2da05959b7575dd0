"""Shares of experts per row, with labels and images → intervals and mutual information.

Rows about one image are not independent (its tokens take the same routes in each), so whole images
are resampled, and labels are shuffled between whole images.

| name | what it gives |
|---|---|
| `mean_shares` | counts → shares, NaN where there is nothing to share |
| `bootstrap_loads` | mean load with a percentile interval |
| `information` | mutual information of group and expert, against shuffled labels |
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.str_]

INTERVAL = (2.5, 97.5)  # percent


@dataclass(frozen=True, kw_only=True)
class Information:
    """Mutual information of group and expert in bits; between 0 and log2 of the fewer of the two.

    Args:
        shuffled_mean, shuffled_95: mean and 95th percentile when labels are shuffled. Above 0
            by chance alone, the more so the fewer images there are.
        p_value: share of shuffles, the real labels among them, that reach `bits`.
    """

    bits: float
    shuffled_mean: float
    shuffled_95: float
    p_value: float


def mean_shares(counts: Integers) -> Doubles:
    """(..., E) counts as shares that sum to 1; NaN if there are none."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        result: Doubles = counts / total
    return result


def bootstrap_loads(
    shares: Doubles, images: Words, num_resamples: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Mean over rows, and its interval when images are drawn again with their rows.

    Args:
        shares: (R, S, E), of one group and phase.
        images: R keys; rows with one key are drawn together.

    Returns:
        mean, lower and upper end, (S, E) each; NaN if no row has a token of the phase.
    """
    sums, sizes = _by_image(shares, images)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / sizes.sum()
        draws = rng.integers(len(sums), size=(num_resamples, len(sums)))
        weights = np.stack([np.bincount(draw, minlength=len(sums)) for draw in draws])
        totals = np.einsum("nm,mse->nse", weights, sums)
        resampled = totals / (weights @ sizes)[:, None, None]
    if not sizes.sum():
        unknown = mean.astype(np.float32)
        return unknown, unknown, unknown
    low, high = np.nanpercentile(resampled, INTERVAL, axis=0)
    return mean.astype(np.float32), low.astype(np.float32), high.astype(np.float32)


def _by_image(shares: Doubles, images: Words) -> tuple[Doubles, Doubles]:
    """Sums over the rows of each image (M, S, E), and their number (M,)."""
    keys, index = np.unique(images, return_inverse=True)
    is_there = np.isfinite(shares).all((1, 2))
    sums = np.zeros((len(keys), *shares.shape[1:]))
    np.add.at(sums, index[is_there], shares[is_there])
    return sums, np.bincount(index[is_there], minlength=len(keys)).astype(np.float64)


def information(
    shares: Doubles,
    groups: Words,
    images: Words,
    num_shuffles: int,
    rng: np.random.Generator,
) -> Information:
    """Mutual information of a row's group and an assignment's expert; every row counts alike.

    Args:
        shares: (R, E), of one phase and sparse layer; rows of NaN are left out.
        groups: R labels; an image with rows of several groups is shuffled as a block of rows.
    """
    is_there = np.isfinite(shares).all(-1)
    shares, groups, images = shares[is_there], groups[is_there], images[is_there]
    if not len(shares):
        return Information(bits=0.0, shuffled_mean=0.0, shuffled_95=0.0, p_value=1.0)
    names, labels = np.unique(groups, return_inverse=True)
    _, image_of = np.unique(images, return_inverse=True)
    found = _bits(shares, labels, len(names))
    shuffled = np.array(
        [_bits(shares, _shuffled(labels, image_of, rng), len(names)) for _ in range(num_shuffles)]
    )
    reached = int((shuffled >= found - 1e-12).sum())
    return Information(
        bits=round(found, 5),
        shuffled_mean=round(float(shuffled.mean()), 5),
        shuffled_95=round(float(np.percentile(shuffled, 95)), 5),
        p_value=round((1 + reached) / (1 + num_shuffles), 5),
    )


def _bits(shares: Doubles, labels: Integers, num_groups: int) -> float:
    joint = np.zeros((num_groups, shares.shape[1]))
    np.add.at(joint, labels, shares)
    joint /= joint.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    present = joint > 0
    return float((joint[present] * np.log2(joint[present] / product[present])).sum())


def _shuffled(labels: Integers, image_of: Integers, rng: np.random.Generator) -> Integers:
    """Labels dealt out anew; if each image has one label, between images, else between rows."""
    num_images = int(image_of.max()) + 1
    lowest = np.full(num_images, np.iinfo(np.int64).max)
    highest = np.full(num_images, -1)
    np.minimum.at(lowest, image_of, labels)
    np.maximum.at(highest, image_of, labels)
    if (lowest == highest).all():
        dealt: Integers = rng.permutation(lowest)[image_of]
        return dealt
    mixed: Integers = rng.permutation(labels)
    return mixed

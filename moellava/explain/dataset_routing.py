"""A model and the rows of a data set → which experts work for which group of rows.

Letters: R rows, S sparse layers, E experts, G groups.

| name | what it gives |
|---|---|
| `route_dataset` | a `DatasetRouting` |
| `DatasetRouting` | load with intervals, mutual information, co-activation, as numbers and drawn |
| `group_of` | the group that a row belongs to |
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moellava.data import Row
from moellava.data.chat_labels import image_items
from moellava.data.collate import ChatCollator, messages_of
from moellava.explain.drawing.routes import draw_coactivation, draw_group_load
from moellava.explain.group_statistics import (
    Information,
    bootstrap_loads,
    information,
    mean_shares,
)
from moellava.explain.routing import PHASES, count_experts
from moellava.messages import unknown_name
from moellava.model.language_model.moe import LlamaMoeRouter
from moellava.model.loaded_model import LoadedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

NOT_SHOWN = (
    "That the load differs between groups shows that the router tells them apart. It does not "
    "show that an expert knows a group's medicine: texture, acquisition, image size and the "
    "wording of the questions differ between groups as well. Nor does an even load show that "
    "experts are alike. Only switching an expert off and scoring the answers would say what it "
    "contributes."
)


@dataclass(frozen=True, kw_only=True)
class DatasetRouting:
    """How the rows of a data set are spread over the experts.

    Args:
        group_by: the field whose values are the groups.
        layers: index in the language model of each of the S sparse layers.
        num_experts_per_tok: k.
        num_rows, num_images: per group.
        load: phase → group → (S, E): mean over rows of each row's shares, so long rows do not
            outweigh short ones; the lower and upper end of its 95 % interval by a bootstrap over
            images.
        information: phase → per sparse layer, mutual information of group and expert.
        coactivation: phase → (S, E, E): of the tokens, the share whose experts include both; the
            diagonal is the share of tokens that an expert received.
    """

    group_by: str
    layers: tuple[int, ...]
    num_experts_per_tok: int
    num_rows: dict[str, int]
    num_images: dict[str, int]
    load: dict[str, dict[str, tuple[Array, Array, Array]]]
    information: dict[str, list[Information]]
    coactivation: dict[str, Array]

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON has it, with the sentence on what it does not show."""
        loads = {
            phase: {
                group: {
                    name: _as_json(values)
                    for name, values in zip(("load", "low", "high"), parts, strict=True)
                }
                for group, parts in groups.items()
            }
            for phase, groups in self.load.items()
        }
        return {
            "group_by": self.group_by,
            "layers": list(self.layers),
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_rows": self.num_rows,
            "num_images": self.num_images,
            "load": loads,
            "mutual_information_bits": {
                phase: [dict(vars(layer)) for layer in layers]
                for phase, layers in self.information.items()
            },
            "coactivation": {
                phase: _as_json(values) for phase, values in self.coactivation.items()
            },
            "not_shown": NOT_SHOWN,
        }

    def draw(self, path: Path | str | None = None) -> "Figure":
        """The load of each expert per group, layer and phase, with intervals and the even line.

        Above each panel stands the mutual information of group and expert, and the 95th percentile
        of that of shuffled labels.
        """
        num_rows, num_images = sum(self.num_rows.values()), sum(self.num_images.values())
        title = f"Load by {self.group_by}: {num_rows} rows, {num_images} images, 95 % intervals"
        notes = {
            phase: [f"{layer.bits:.3f} bits (chance < {layer.shuffled_95:.3f})" for layer in layers]
            for phase, layers in self.information.items()
        }
        return draw_group_load(self.layers, self.load, notes, title=title, path=path)

    def draw_coactivation(self, path: Path | str | None = None) -> "Figure":
        """Which experts are chosen together, per layer and phase."""
        num_experts = next(iter(self.coactivation.values())).shape[1]
        even = self.num_experts_per_tok * (self.num_experts_per_tok - 1)
        even /= max(1, num_experts * (num_experts - 1))
        return draw_coactivation(self.layers, self.coactivation, even=even, path=path)


def route_dataset(
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    group_by: str,
    batch_size: int = 8,
    num_resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> DatasetRouting:
    """Route every row, with its own answers, and compare groups of rows.

    Args:
        rows: each with an answer; what the model itself would answer is not asked.
        group_by: `answer_type`, `source`, `split`, or a field of the rows' `extra`, as `modality`.
        num_resamples: of the bootstrap, and of the shuffles of labels.

    Raises:
        ValueError: for no rows, a field that rows lack, or a model without moellava's experts.
    """
    config = loaded.model.config.text_config
    routers = [module for module in loaded.model.modules() if isinstance(module, LlamaMoeRouter)]
    if not routers:
        raise ValueError(
            "This language model has no experts of moellava's, so there is no routing."
        )
    if len(rows) == 0:
        raise ValueError("There are no rows to route.")
    groups = np.array([group_of(row, group_by) for row in rows])
    counts, pairs, images = _route_rows(loaded, rows, routers, batch_size, progress)
    rng = np.random.default_rng(seed)
    shares = mean_shares(counts)  # (R, 3, S, E), NaN if a row has no token of a phase
    names = sorted(set(groups.tolist()))
    return DatasetRouting(
        group_by=group_by,
        layers=tuple(config.moe_layer_indices),
        num_experts_per_tok=config.num_experts_per_tok,
        num_rows={name: int((groups == name).sum()) for name in names},
        num_images={name: len(set(images[groups == name].tolist())) for name in names},
        load={
            phase: {
                name: bootstrap_loads(
                    shares[groups == name, number], images[groups == name], num_resamples, rng
                )
                for name in names
            }
            for number, phase in enumerate(PHASES)
        },
        information={
            phase: [
                information(shares[:, number, layer], groups, images, num_resamples, rng)
                for layer in range(shares.shape[2])
            ]
            for number, phase in enumerate(PHASES)
        },
        coactivation={phase: pairs[number] for number, phase in enumerate(PHASES)},
    )


def _as_json(values: Array) -> object:
    """Nested lists; JSON has no NaN, so what is not known is None."""
    rounded = np.round(values.astype(np.float64), 5).astype(object)
    rounded[~np.isfinite(values)] = None
    return rounded.tolist()


def group_of(row: Row, group_by: str) -> str:
    """The value of a row's field, as text.

    Raises:
        ValueError: if the row has no such field; those that it has are listed.
    """
    own = {"answer_type": row.answer_type, "source": row.source, "split": row.split}
    fields = {**row.extra, **{name: value for name, value in own.items() if value}}
    if group_by not in fields:
        raise unknown_name(f"field of row {row.id}:", group_by, fields)
    return str(fields[group_by])


def _route_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    routers: Sequence[LlamaMoeRouter],
    batch_size: int,
    progress: bool,
) -> tuple[Integers, list[Array], npt.NDArray[np.str_]]:
    """Counts (R, 3, S, E), co-activation per phase (S, E, E), and a key of each row's images."""
    collate = ChatCollator(loaded.processor)
    num_experts: int = loaded.model.config.text_config.num_experts
    counts, keys = [], []
    pairs = np.zeros((len(PHASES), len(routers), num_experts, num_experts))
    num_tokens = np.zeros(len(PHASES))
    starts: Sequence[int] = range(0, len(rows), batch_size)
    if progress:
        from tqdm.auto import tqdm

        starts = tqdm(starts, unit="batch")
    for start in starts:
        batch_rows = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        batch = {name: value.to(loaded.model.device) for name, value in collate(batch_rows).items()}
        num_views = _num_views(loaded, batch, batch_rows)
        keys += _image_keys(batch_rows, batch.get("pixel_values"), num_views)
        experts = _experts(loaded, batch, routers)  # (S, B, T, k)
        phases = _phases(loaded, batch)  # (3, B, T)
        for number in range(len(batch_rows)):
            own = [experts[:, number, is_phase[number]] for is_phase in phases]
            counts.append(np.stack([count_experts(part, num_experts) for part in own]))
        for index, is_phase in enumerate(phases):
            chosen = np.eye(num_experts)[experts[:, is_phase]].sum(-2)  # (S, tokens, E)
            pairs[index] += np.einsum("ste,stf->sef", chosen, chosen)
            num_tokens[index] += is_phase.sum()
    shares = pairs / np.maximum(num_tokens, 1)[:, None, None, None]
    return np.stack(counts), list(shares.astype(np.float32)), np.array(keys)


@torch.inference_mode()
def _experts(
    loaded: LoadedModel, batch: dict[str, Tensor], routers: Sequence[LlamaMoeRouter]
) -> Integers:
    """The experts of every token of a batch, (S, B, T, k)."""
    chosen: list[Tensor] = []

    def take(module: object, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(output[2].cpu())

    handles = [router.register_forward_hook(take) for router in routers]
    try:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loaded.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    num_rows, num_tokens = batch["input_ids"].shape
    experts: Integers = torch.stack(chosen).view(len(chosen), num_rows, num_tokens, -1).numpy()
    return experts


def _phases(loaded: LoadedModel, batch: dict[str, Tensor]) -> npt.NDArray[np.bool_]:
    """(3, B, T) whether each token is of the image, the question or the answer; padding is none."""
    is_token = batch["attention_mask"].bool()
    is_image = batch["input_ids"] == loaded.model.config.image_token_id
    is_answer = batch["labels"] != -100
    stacked = torch.stack([is_image, ~is_image & ~is_answer, is_answer]) & is_token
    phases: npt.NDArray[np.bool_] = stacked.cpu().numpy()
    return phases


def _num_views(loaded: LoadedModel, batch: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[int]:
    """How many views the images of each row have."""
    processor = loaded.processor
    if "image_sizes" not in batch:
        is_image = batch["input_ids"] == processor.image_token_id
        views: list[int] = (is_image.sum(1) // processor.num_image_tokens).tolist()
        return views
    sizes = iter(batch["image_sizes"].tolist())
    counts = [len(image_items(messages_of(row))) for row in rows]
    return [
        sum(processor.layout((width, height)).num_views for height, width in islice(sizes, count))
        for count in counts
    ]


def _image_keys(
    rows: Sequence[Row], pixel_values: Tensor | None, num_views: Sequence[int]
) -> list[str]:
    """What the model sees of each row's images, as a hash; rows without images stand alone."""
    keys, used = [], 0
    for row, count in zip(rows, num_views, strict=True):
        if not row.images or pixel_values is None:
            keys.append(f"row {row.id}")
            continue
        own = pixel_values[used : used + count].float().cpu().numpy()
        used += count
        keys.append(hashlib.sha256(own.tobytes()).hexdigest()[:16])
    return keys

"""A recipe → what would be trained, in how many steps, with an estimate of memory and work.

Nothing is trained, and no weights are read.

| name | what it does |
|---|---|
| `plan` | the plan of a recipe |
| `plan_gradient_steps` | that of a stage that trains by gradient steps |
| `PlannedRows`, `count_steps`, `describe_costs`, `layer_ranges` | what plans have in common |
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from torch import nn

from moellava.data.chat_labels import image_items
from moellava.data.collate import ChatCollator, messages_of
from moellava.model.loaded_model import LoadedModel
from moellava.train.arguments import training_arguments
from moellava.train.batches import TrainData, build_collator, read_data, row_lengths
from moellava.train.estimates import CARD, estimate_flops, estimate_memory
from moellava.train.options import Optim, Recipe
from moellava.train.prepare import prepare_model
from moellava.train.stage import Plan, stage_of


def plan(recipe: Recipe) -> Plan:
    """Read the rows and the model's config, count, and estimate; the model is on the meta device.

    Raises: as `moellava.train.train` before its first step.
    """
    return stage_of(recipe).plan(recipe)


@dataclass(frozen=True)
class PlannedRows:
    """The rows of a recipe as far as a plan needs them."""

    lengths: Sequence[int]  # tokens of each
    num_held_out: int
    images_per_row: float  # of the first thousand; views, with tiling

    @classmethod
    def of(cls, recipe: Recipe, loaded: LoadedModel) -> "PlannedRows":
        """Read them, without opening an image, unless the model has tiling."""
        data, collator = read_data(recipe), build_collator(recipe, loaded.processor)
        lengths = row_lengths(data.train, collator)
        num_held_out = 0 if data.evaluation is None else len(data.evaluation)
        images = 0.0 if recipe.data.features else _images_per_row(data, collator)
        return cls(lengths, num_held_out, images)

    def costs(
        self, model: nn.Module, recipe: Recipe, *, num_rows: int
    ) -> tuple[dict[str, float], float]:
        """GiB of a device for a batch of the longest rows, and FLOP of `num_rows` rows."""
        memory = estimate_memory(model, recipe, longest=max(self.lengths))
        one_row = estimate_flops(
            model, recipe, length=mean(self.lengths), images_per_row=self.images_per_row
        )
        return memory, num_rows * one_row

    def text(self) -> str:
        """One line about them."""
        lengths = self.lengths
        return (
            f"rows {len(lengths):,}, tokens of a row {min(lengths)} to {max(lengths)}, "
            f"mean {mean(lengths):.0f}; held-out rows {self.num_held_out:,}"
        )


def plan_gradient_steps(recipe: Recipe) -> Plan:
    """The plan of a stage that trains by gradient steps."""
    arguments = training_arguments(recipe, show_progress=False)
    model, loaded = prepare_model(recipe, on_meta=True)
    rows = PlannedRows.of(recipe, loaded)
    optim, count = recipe.optim, len(rows.lengths)
    per_epoch = math.ceil(count / optim.batch_size)
    num_steps = count_steps(optim, count)
    num_rows = num_steps * optim.batch_size if optim.max_steps else math.ceil(optim.epochs * count)
    memory, flops = rows.costs(model, recipe, num_rows=num_rows)
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    lines = [
        f"stage {recipe.stage}: trains {trained:,} of {total:,} parameters "
        f"({100 * trained / total:.2f} %)",
        *(f"  {line}" for line in list_trained(model)),
        rows.text(),
        f"steps {num_steps:,} of {optim.batch_size} rows: {optim.per_device_batch_size} at once, "
        f"{arguments.gradient_accumulation_steps} accumulated, {arguments.world_size} processes; "
        f"{per_epoch:,} a pass",
        f"warm-up {arguments.get_warmup_steps(num_steps)} steps to {optim.learning_rate:g}, then "
        f"{optim.schedule}; {optim.optimizer}, {optim.precision}",
        *describe_costs(memory, flops),
    ]
    return Plan(trained, total, count, num_steps, memory, flops, "\n".join(lines))


def count_steps(optim: Optim, num_rows: int) -> int:
    """Optimizer steps over so many rows."""
    return optim.max_steps or math.ceil(math.ceil(num_rows / optim.batch_size) * optim.epochs)


def describe_costs(memory: dict[str, float], flops: float) -> list[str]:
    """Memory and work, in lines."""
    return [
        "memory of one device, estimated for a batch of the longest rows, without sharding:",
        *(f"  {name:<14} {value:8.2f} GiB" for name, value in memory.items()),
        f"work {flops:.3g} FLOP, about {CARD.hours(flops):.2g} hours on one {CARD.name} "
        f"({100 * CARD.utilisation:.0f} % of {CARD.flops / 1e12:.0f} TFLOP/s assumed)",
    ]


def list_trained(model: nn.Module) -> list[str]:
    """The weights that learn, equal names of different layers in one line."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            key = re.sub(r"\.layers\.\d+\.", ".layers.*.", name), tuple(weight.shape)
            groups.setdefault(key, []).append(name)
    lines = []
    for (name, shape), names in groups.items():
        layers = [int(match[1]) for one in names if (match := re.search(r"\.layers\.(\d+)\.", one))]
        where = f"  in layers {layer_ranges(layers)}" if layers else ""
        lines.append(f"{name} {shape}{where}: {len(names) * math.prod(shape):,}")
    return lines


def layer_ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in few words: 0-21, or 0,2,...,20."""
    is_even = len(numbers) > 2 and len({b - a for a, b in pairwise(numbers)}) == 1
    if not is_even:
        return ",".join(map(str, numbers))
    first, second, last = numbers[0], numbers[1], numbers[-1]
    return f"{first}-{last}" if second == first + 1 else f"{first},{second},...,{last}"


def _images_per_row(data: TrainData, collator: ChatCollator) -> float:
    rows = (data.train[index] for index in range(min(len(data.train), 1000)))
    items = [image_items(messages_of(row)) for row in rows]
    if collator.processor.tiling is None:
        return mean(map(len, items))
    opened = ([collator.load_image(item["image"]) for item in own] for own in items)
    return mean(
        sum(collator.processor.layout(image.size).num_views for image in own) for own in opened
    )

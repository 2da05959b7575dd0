"""What an encoder's config says, and which of its fields a user may choose.

VisionEncoderConfig             the fields that every encoder has
option, options_of              a field that a user may choose, and all of them
OptionValue, check_options      what such a field can be, and the check of what was given

An option is written once, here or in a family's config: `create_encoder`, the builder's mapping and
the command line ask `options_of` for their names, types, defaults and help.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, get_args

from huggingface_hub.dataclasses import strict, type_validator
from transformers.configuration_utils import PreTrainedConfig

from moellava.messages import did_you_mean

OptionValue = int | str | bool | Sequence[int] | None

# LLaVA's "default" is the same as "patch". Its "full" is "cls_patch" if the trunk has a class
# token, else "patch".
SELECT_FEATURES = ("patch", "default", "cls_patch", "full", "cls")
PATCH_TOKENS = ("auto", "real", "synthesized")


def option(default: Any, help: str) -> Any:
    """A config field that a user may choose; `help` is one sentence for docs and `--help`."""
    return field(default=default, metadata={"help": help})


@strict
class VisionEncoderConfig(PreTrainedConfig):
    """What every encoder's config says; each field is plain JSON.

    Besides the options:

    Args:
        tower: the tower whose weights were really loaded (a repo id, or a local folder's own name).
        revision: the commit those weights came from, if there is one.
        hidden_size, num_patches, grid: width, tokens per image after selection, (rows, columns) of
            patches. Measured from the trunk whenever an encoder is built; never chosen.
    """

    image_size: int | list[int] | tuple[int, int] | None = option(
        None, "Pixels, one side or (height, width); the trained size if not given."
    )
    patch_tokens: str = option(
        "auto", "'auto': real tokens if the trunk has any; 'real' insists; 'synthesized' never."
    )
    select_layer: int | list[int] | tuple[int, ...] = option(
        -2,
        "LLaVA's count: -1 the last block's output, -2 the one before it, k > 0 that of block k-1. "
        "Several are joined along the width.",
    )
    select_feature: str = option(
        "patch", "'patch' (or 'default'), 'cls_patch', 'full' (as far as there is one), or 'cls'."
    )
    final_norm: bool = option(False, "Apply the trunk's last norm to the selected layers.")
    tower: str | None = None
    revision: str | None = None
    hidden_size: int | None = None
    num_patches: int | None = None
    grid: list[int] | tuple[int, int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.image_size is None:
            self.image_size = self.trained_image_size
        for name in ("image_size", "select_layer", "grid"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))  # what JSON gives back
        _check_choice("select_feature", self.select_feature, SELECT_FEATURES)
        _check_choice("patch_tokens", self.patch_tokens, PATCH_TOKENS)
        if self.select_feature == "default":
            self.select_feature = "patch"
        if self.select_layer == []:
            raise ValueError(
                "select_layer is an empty list; give a layer such as -2, or several such as "
                "[-2, -5]."
            )
        image_height_width(self.image_size)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def trained_image_size(self) -> int | list[int]:
        """Pixels that the weights were trained at: one side, or [height, width]."""
        return 224

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the image that the encoder takes, in pixels."""
        return image_height_width(self.image_size or self.trained_image_size)

    @property
    def layers(self) -> list[int]:
        """`select_layer` as a list."""
        return (
            [self.select_layer] if isinstance(self.select_layer, int) else list(self.select_layer)
        )


def image_height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of an `image_size`, one side or both.

    Raises:
        ValueError: not one or two positive sides.
    """
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size is {image_size}; give one side, or [height, width].")
    if min(sides) < 1:
        raise ValueError(f"image_size is {image_size}; give a positive side, or [height, width].")
    return sides[0], sides[1]


def options_of(config_class: type[VisionEncoderConfig]) -> dict[str, Field[Any]]:
    """The fields of a config that a user may choose, by name; `metadata["help"]` explains each.

    A family that gives an option another default inherits that it is one.
    """
    chosen = {
        field.name
        for base in config_class.__mro__
        if is_dataclass(base)
        for field in fields(base)
        if "help" in field.metadata
    }
    return {field.name: field for field in fields(config_class) if field.name in chosen}


def check_options(
    config_class: type[VisionEncoderConfig],
    given: Mapping[str, object],
    known: Collection[str] | None = None,
) -> None:
    """Refuse names that the config does not have, and values of another type than the field's.

    Args:
        known: the names to admit; all fields of the config if not given.

    Raises:
        TypeError: an unknown name; the nearest known one is suggested.
        ValueError: a value of the wrong type; the option, its value and the type are named.
    """
    types = {field.name: field.type for field in fields(config_class)}
    known = types if known is None else known
    for name, value in given.items():
        if name not in known:
            raise TypeError(
                f"{config_class.__name__} has no option {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(options_of(config_class))}."
            )
        if not _is_of(types[name], value):
            expected = getattr(types[name], "__name__", str(types[name])).removesuffix(" | None")
            raise ValueError(f"{name} is {value!r}; expected {expected}.")


def _is_of(expected: Any, value: object) -> bool:
    if isinstance(value, bool) and bool not in (expected, *get_args(expected)):
        return False  # a bool is an int to Python; image_size=True is a mistake all the same
    try:
        type_validator("option", value, expected)
    except TypeError:
        return False
    return True


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")

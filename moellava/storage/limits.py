"""How much a file may ask for, checked before memory is spent: one table, one error.

require_within    one number against its limit
require_bounded   every size in a model's config, nested ones included
require_unpackable  a zip archive, by what its members unpack into
limit             a limit's value; MOELLAVA_MAX_<NAME> in the environment raises it
"""

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from moellava.messages import unknown_name

# Name to the most that is accepted. Real models stay well below: Llama 3.1 405B has 126 layers,
# DeepSeek V3 has 256 experts.
LIMITS = {
    "layers": 1024,
    "experts": 1024,
    "width": 262_144,  # channels of a token, of an MLP, of an image
    "vocabulary": 16_777_216,  # rows of an embedding
    "nesting": 32,  # levels of a config
    "values": 100_000,  # of a YAML file, once its aliases are unfolded
    "queries": 65_536,  # of a projector that has its own
    "tiles": 64,  # of one image
    "side": 8_192,  # pixels of the square that a tower sees
    "aspect": 1_000,  # the longer side of an image over the shorter one
    "frame": 1 << 28,  # bytes of one decoded frame or slice, of which several copies are held
    "grid": 256,  # pictures side by side in one
    "pictures": 256,  # slices, frames or tiles that one image stands for
    "slices": 20_000,  # files of a folder that holds a DICOM series
    "unpacked": 1 << 29,  # bytes of a compressed file that is unpacked in memory
    "expansion": 100,  # an archive's size once it is unpacked, over its own
}

# The fields of configs that each limit applies to.
CONFIG_FIELDS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "depth", "layers"), "layers"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "experts"),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), "width"),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), "width"),
    **dict.fromkeys(("num_latents", "num_query_tokens"), "queries"),
    **dict.fromkeys(("width", "embed_dim", "heads"), "width"),  # of open_clip's configs
    **dict.fromkeys(("image_size", "shortest_edge", "longest_edge", "height"), "side"),
    "vocab_size": "vocabulary",
}


def limit(name: str) -> int:
    """The limit of `LIMITS`, or what the environment variable `MOELLAVA_MAX_<NAME>` says.

    Raises:
        ValueError: the variable is not a whole number.
    """
    if name not in LIMITS:
        raise unknown_name("limit", name, LIMITS)
    given = os.environ.get(_variable(name))
    if given is None:
        return LIMITS[name]
    if not given.isdigit():
        raise ValueError(f"{_variable(name)} is {given!r}; expected a whole number.")
    return int(given)


def require_within(name: str, found: int, where: object) -> None:
    """Raise `ValueError` if a number is beyond its limit; the text says how to raise the limit.

    Args:
        name: a key of `LIMITS`.
        where: what asks for it, such as a file or an option.
    """
    most = limit(name)
    if found > most:
        raise ValueError(
            f"{where} asks for {found:,} ({name}), but the limit is {most:,}. If that many are "
            f"meant, set the environment variable {_variable(name)}={found}."
        )


def require_bounded(where: object, config: Mapping[str, object]) -> None:
    """Raise `ValueError` if a size in a config, or in a config inside it, is beyond its limit."""
    for path, name, value in _sizes(config, (), where):
        require_within(name, value, f"{'.'.join(path)} in {where}")


def require_unpackable(path: Path) -> None:
    """Raise `ValueError` if a zip archive grows beyond its limit when it is unpacked.

    `zipfile` reads no more of a member than the size that is counted here.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    require_within("expansion", unpacked // max(1, path.stat().st_size), path)


def _sizes(
    config: Mapping[str, object], outer: tuple[str, ...], where: object
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    require_within("nesting", len(outer), where)
    for key, value in config.items():
        path = (*outer, str(key))
        name = CONFIG_FIELDS.get(str(key))
        if isinstance(value, Mapping):
            yield from _sizes(value, path, where)
        elif name is not None:
            values = value if isinstance(value, list | tuple) else [value]
            yield from ((path, name, size) for size in values if isinstance(size, int))


def _variable(name: str) -> str:
    return f"MOELLAVA_MAX_{name.upper()}"

"""A checkpoint that carries its own code, to be opened without moellava: `write_remote_code`.

transformers copies flat .py files with relative imports, and this package is nested. So each module
that the model needs is written into the checkpoint folder under a flat name,
`moellava/encoders/base.py` as `moellava_encoders_base.py`; only its imports of moellava are
rewritten.
"""

import ast
import json
import os
from pathlib import Path

from moellava.storage.sources import read_json
from moellava.storage.writing import write_text

PACKAGE = Path(__file__).parents[2]
ENTRY = "modeling_moellava_remote"
ENTRY_TEXT = '''"""The entry of this checkpoint's code, by moellava.model.publish.remote_code."""

from .moellava_encoders import VisionEncoder  # registers the towers with the Auto classes
from .moellava_model import (
    MoeLlavaConfig,
    MoeLlavaForConditionalGeneration,
    MoeLlavaModel,
    MoeLlavaProcessor,
)
'''
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": f"{ENTRY}.MoeLlavaConfig",
        "AutoModel": f"{ENTRY}.MoeLlavaModel",
        "AutoModelForImageTextToText": f"{ENTRY}.MoeLlavaForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": f"{ENTRY}.MoeLlavaProcessor"},
}


def write_remote_code(folder: str | os.PathLike[str]) -> list[str]:
    """Write the model's code into a saved checkpoint, and name its classes in `auto_map`.

    Args:
        folder: written by `save_pretrained` of the model and of the processor. Towers of encoders
            that were registered from outside moellava are not covered.

    Returns:
        The names of the written code files.

    Raises:
        OSError: if the folder is not a saved model with its processor.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in AUTO_MAPS if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"{folder} has no {' and no '.join(missing)}: save the model and the processor there "
            "first."
        )
    sources = {ENTRY: ENTRY_TEXT}
    waiting = ["moellava.model", "moellava.encoders"]
    while waiting:
        module = waiting.pop()
        if _flat(module) not in sources:
            sources[_flat(module)], needed = _flattened(module)
            waiting += needed
    for name, text in sources.items():
        write_text(folder / f"{name}.py", text)
    for name, auto_map in AUTO_MAPS.items():
        _write_auto_map(folder / name, auto_map)
    return sorted(f"{name}.py" for name in sources)


def carry_remote_code(folder: str | os.PathLike[str]) -> None:
    """Write the running code along with what it saves, if it came with a checkpoint.

    transformers copies the module of the saved class alone, under names of its own.
    """
    if not __name__.startswith("transformers_modules."):
        return
    folder = Path(folder)
    for path in Path(__file__).parent.glob("*.py"):
        if path.name == f"{ENTRY}.py" or path.name.startswith("moellava"):
            write_text(folder / path.name, path.read_text(encoding="utf-8"))
    for name, auto_map in AUTO_MAPS.items():
        if (folder / name).is_file():
            _write_auto_map(folder / name, auto_map)


def _write_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    settings = read_json(path) | {"auto_map": auto_map}
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's text with flat imports of moellava, and the modules that these name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(
        encoding="utf-8"
    )
    lines, needed = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moellava":
            assert node.module is not None
            needed.append(node.module)
            line = node.lineno - 1
            lines[line] = lines[line].replace(
                f"from {node.module} import", f"from .{_flat(node.module)} import", 1
            )
    return "".join(lines), needed

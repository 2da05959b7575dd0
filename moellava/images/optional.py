"""Libraries that only some files need, imported when the first such file is read."""

import importlib
from types import ModuleType


def load_optional(module: str, why: str, *, extra: str) -> ModuleType:
    """The module, or an `ImportError` that says what to install.

    By name rather than by an import statement: transformers reads those of a checkpoint's code as
    requirements.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name != module:  # it is there, and something of its own is not
            raise
        raise ImportError(
            f"{why}. To read it, type: pip install 'moellava[{extra}]'", name=module
        ) from error

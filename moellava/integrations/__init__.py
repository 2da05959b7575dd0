"""Files that register moellava's models with other trainers: `NAMES`, `integration_file`.

They are run by those trainers, never imported here.
"""

from pathlib import Path

from moellava.messages import unknown_name

NAMES = {"ms-swift": "ms_swift.py", "llama-factory": "llama_factory.py"}


def integration_file(name: str) -> Path:
    """The file for a trainer.

    Raises:
        ValueError: for a name that is not in `NAMES`.
    """
    if name not in NAMES:
        raise unknown_name("integration", name, NAMES)
    return Path(__file__).with_name(NAMES[name])

"""What the demo needs beyond moellava itself: `require_packages`."""

import importlib.util

PACKAGES = ("accelerate", "matplotlib", "nilearn", "pydicom", "skimage")


def require_packages() -> None:
    """Raise `ImportError` with what to install, before anything is trained."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'The demo needs {", ".join(missing)}. Type: pip install "moellava[demo]"'
        )

"""moellava's classes with transformers' Auto classes, without importing transformers first.

`import moellava` takes a moment and transformers takes seconds, so registration follows
transformers: at once if its Auto classes are there already, else right after they are imported.
Either way `AutoModelForImageTextToText.from_pretrained(folder)` knows our classes once both
packages are in.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import RLock
from types import ModuleType

# All other modules with Auto classes import this one.
_AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Register now, or as soon as transformers' Auto classes are imported."""
    if _AUTO_CLASSES in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    import_module("moellava.model")  # registers itself and the encoders


class _AfterTransformers(MetaPathFinder):
    """Watches imports of transformers and moellava; registers when the outermost module has run.

    Not earlier: modules of a package import each other, and ours need those they import whole.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._num_running = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say; the module that they find reports when it has run."""
        if fullname.partition(".")[0] not in ("transformers", "moellava"):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Loader) -> None:
        run_module = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            with self._lock:
                self._num_running += 1
            try:
                run_module(module)
            finally:
                with self._lock:
                    self._num_running -= 1
            if self._num_running == 0 and _AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = run_and_register  # type: ignore[method-assign]

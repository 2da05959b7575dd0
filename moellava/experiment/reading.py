"""A YAML file and `key=value` words → a checked `Experiment`: `load_experiment`."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moellava.experiment.options import Experiment
from moellava.settings import from_mapping
from moellava.storage.settings_file import override, read_settings


def load_experiment(
    source: str | Path | Mapping[str, object], overrides: Iterable[str] = ()
) -> Experiment:
    """Read an experiment.

    Args:
        source: a YAML file, or a mapping.
        overrides: `key=value`, values in YAML; dots go into sections: `evaluation.limit=10`.

    Raises:
        OSError: there is no such file.
        ValueError: an unknown key, with the nearest known one; a value that its key does not admit.
    """
    if isinstance(source, Mapping):
        settings = dict(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There is no experiment file {str(source)!r}.")
        settings = read_settings(path)
    override(settings, overrides)
    return from_mapping(Experiment, settings, kind="experiment key")

"""moellava in lmms-eval: a model plug-in, and tasks for sets that lmms-eval lacks.

| name | use |
|---|---|
| `manifest` | the entry point in the group `lmms_eval.models` |
| `tasks_folder` | what `lmms_eval --include_path` takes; `moellava eval lmms-tasks` prints it |
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Tells lmms-eval of `--model moellava`; the model's module loads when it is chosen."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="moellava", chat_class_path="moellava.eval.lmms.model.MoellavaChat"
    )


def tasks_folder() -> Path:
    """The folder of the task files."""
    return Path(__file__).parent / "tasks"

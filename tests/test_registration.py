"""Our classes are registered whatever is imported first."""

import pytest

from tests.processes import printed

IS_REGISTERED = """
import moellava
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
print(AutoConfig.for_model("moellava").text_config.model_type)
print(moellava.MoeLlavaConfig in AutoModelForImageTextToText._model_mapping.keys())
"""


# What a program may import first; the last two leave transformers half imported when ours come in.
FIRST_IMPORTS = (
    "import moellava",
    "from transformers import AutoModel, GenerationMixin",
    "import moellava.encoders",
    "import moellava.model.language_model.moe",
    "import moellava; from transformers import GenerationMixin",
    "import moellava; from transformers import Trainer",
)


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_the_auto_classes_know_ours_whatever_is_imported_first(first):
    assert printed(first + IS_REGISTERED) == ["llama_moe", "True"]

"""What `import moellava` costs, and that its classes are registered whatever is imported first."""

import subprocess
import sys

import pytest

import moellava

LATE = (
    "open_clip",
    "timm",
    "pydicom",
    "nibabel",
    "skimage",
    "nilearn",
    "matplotlib",
    "peft",
    "torchao",
)
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


def run(code: str) -> list[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, moellava; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert run(code) == ["[]"]


def test_the_classes_load_no_optional_library():
    code = (
        "import sys, transformers.models.llama.modeling_llama\n"
        "before = set(sys.modules)  # transformers loads some of these itself if they are there\n"
        "import moellava.model\n"
        f"print([name for name in {LATE} if name in sys.modules and name not in before])\n"
    )
    assert run(code) == ["[]"]


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_the_auto_classes_know_ours_whatever_is_imported_first(first):
    assert run(first + IS_REGISTERED) == ["llama_moe", "True"]


@pytest.mark.parametrize("name", moellava.__all__)
def test_a_public_name_is_there(name):
    assert getattr(moellava, name) is not None
    assert name in dir(moellava)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="load_pretrained_modle"):
        moellava.load_pretrained_modle  # noqa: B018


def test_the_package_is_typed():
    from importlib.resources import files

    assert (files("moellava") / "py.typed").is_file()


def test_importing_the_package_loads_neither_open_clip_nor_timm():
    code = (
        "import sys, moellava.encoders as e; "
        "print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

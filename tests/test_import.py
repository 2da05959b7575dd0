"""What `import moellava` costs, and the names that it has."""

import pytest

import moellava
from tests.processes import printed

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


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, moellava; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert printed(code) == ["[]"]


def test_the_classes_load_no_optional_library():
    code = (
        "import sys, transformers.models.llama.modeling_llama\n"
        "before = set(sys.modules)  # transformers loads some of these itself if they are there\n"
        "import moellava.model\n"
        f"print([name for name in {LATE} if name in sys.modules and name not in before])\n"
    )
    assert printed(code) == ["[]"]


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


def test_importing_the_encoders_loads_neither_open_clip_nor_timm():
    code = (
        "import sys, moellava.encoders as e; "
        "print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    )
    assert printed(code) == ["[]"]

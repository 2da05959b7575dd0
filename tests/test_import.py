import subprocess
import sys

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


def test_import_loads_no_optional_library_and_registers_the_auto_classes():
    code = (
        "import sys, transformers.models.llama.modeling_llama\n"
        "before = set(sys.modules)  # transformers loads some of these itself where they are installed\n"
        "import moellava; from transformers import AutoConfig, AutoModelForImageTextToText\n"
        f"print([name for name in {LATE} if name in sys.modules and name not in before])\n"
        "print(AutoConfig.for_model('moellava').text_config.model_type)\n"
        "print(moellava.MoeLlavaConfig in AutoModelForImageTextToText._model_mapping.keys())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["[]", "llama_moe", "True"]


def test_the_package_is_typed():
    from importlib.resources import files

    assert (files("moellava") / "py.typed").is_file()

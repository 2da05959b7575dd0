import json
import os
import subprocess
import sys

import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.publish.remote_code import write_remote_code
from moellava.testing import OPENAI_CLIP, TINYLLAMA

# Python's isolated mode leaves the working directory and PYTHONPATH out; the finder hides an
# installed moellava.
OPEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moellava":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
try:
    import moellava
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("moellava can be imported here")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, inputs, outputs = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
given = torch.load(inputs, weights_only=True)
images = [given["image"].numpy()]
batch = processor(text=["<image> What is this?"], images=images, return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    torch.save({"logits": logits, "pixels": pixels, "ids": ids}, outputs)
assert not any(name.split(".")[0] == "moellava" for name in sys.modules)
print(type(model).__module__, type(processor).__module__,
type(processor.image_processor).__module__)
"""


@pytest.fixture(
    scope="module",
    params=["BiomedCLIP and a mixture", "CLIP, tiles and a dense Llama", "a mixture in 4 bits"],
)
def joined(request, loaded, groupable_parts):
    if request.param.endswith("4 bits"):
        return load_pretrained_model(groupable_parts, dtype="bfloat16", load_in_4bit=True)
    if request.param.startswith("BiomedCLIP"):
        return loaded
    description = {
        "model_name_or_path": TINYLLAMA,
        "mm_vision_tower": OPENAI_CLIP,
        "tiling": {"max_tiles": 2},
    }
    return load_pretrained_model(description, moe_config=False, dtype="float32")


@pytest.fixture(scope="module")
def saved(joined, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "checkpoint"
    joined.model.save_pretrained(folder)
    joined.processor.save_pretrained(folder)
    write_remote_code(folder)
    return folder


def test_a_process_without_moellava_opens_it_and_gets_the_same_logits(
    joined, images, saved, tmp_path
):
    import numpy as np

    picture = np.array(images[0].convert("RGB").resize((900, 450)))
    torch.save({"image": torch.from_numpy(picture)}, tmp_path / "inputs.pt")
    env = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    env |= {"HF_HUB_CACHE": str(tmp_path / "no-cache"), "HF_HUB_OFFLINE": "1"}
    script = [
        sys.executable,
        "-I",
        "-c",
        OPEN,
        str(saved),
        str(tmp_path / "inputs.pt"),
        str(tmp_path / "out.pt"),
    ]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name.startswith("transformers_modules.") for name in done.stdout.split()[:2]), (
        done.stdout
    )
    batch = joined.processor(text=["<image> What is this?"], images=[picture], return_tensors="pt")
    assert len(batch["pixel_values"]) == (1 if joined.processor.tiling is None else 3)
    with torch.no_grad():
        logits = joined.model(**batch).logits
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["ids"], batch["input_ids"])
    assert torch.equal(found["pixels"], batch["pixel_values"])
    torch.testing.assert_close(found["logits"], logits, rtol=1e-6, atol=1e-6)


def test_what_such_a_process_saves_again_can_be_opened(joined, images, saved, tmp_path):
    import numpy as np

    picture = np.array(images[0].convert("RGB"))
    torch.save({"image": torch.from_numpy(picture)}, tmp_path / "inputs.pt")
    env = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    again = tmp_path / "again"
    save = f"model.save_pretrained({str(again)!r}); processor.save_pretrained({str(again)!r})\n"
    for folder, more in ((saved, save), (again, "")):
        arguments = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
        script = [sys.executable, "-I", "-c", OPEN + more, *arguments]
        done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    batch = joined.processor(text=["<image> What is this?"], images=[picture], return_tensors="pt")
    with torch.no_grad():
        logits = joined.model(**batch).logits
    found = torch.load(tmp_path / "out.pt", weights_only=True)["logits"]
    torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)


def test_moellava_itself_still_opens_it_with_its_own_classes(saved, joined):
    again = load_pretrained_model(saved)
    assert type(again.model) is type(joined.model)
    assert type(again.processor) is type(joined.processor)


def test_the_code_is_the_packages_own_and_names_no_module_that_is_not_there(saved):
    from transformers.dynamic_module_utils import get_relative_import_files

    entry = json.loads((saved / "config.json").read_text())["auto_map"]["AutoModel"].split(".")[0]
    needed = {os.path.basename(path) for path in get_relative_import_files(saved / f"{entry}.py")}
    assert needed == {path.name for path in saved.glob("moellava*.py")}
    for path in saved.glob("*.py"):
        assert not any(
            line.lstrip().startswith("import moellava") for line in path.read_text().splitlines()
        )


def test_a_folder_without_processor_is_refused(loaded, tmp_path):
    loaded.model.config.save_pretrained(tmp_path)
    with pytest.raises(
        OSError, match=r"has no processor_config\.json: save the model and the processor"
    ):
        write_remote_code(tmp_path)

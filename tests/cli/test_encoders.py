"""`encoders show`, `encode` and `classify` as a user types them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from moellava.cli import app as cli
from moellava.encoders import create_encoder
from moellava.testing import BIOMEDCLIP, OPENAI_CLIP, REVISION


def run(*words):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for i in range(5):
        pixels = random.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / ("sub" if i % 2 else ".") / f"{i}.png")
    (images / "notes.txt").write_text("no image")
    return images


def test_show_prints_the_files_of_a_folder(small_biomedclip):
    code, text = run("encoders", "show", small_biomedclip)
    assert code == 0
    assert "tower biomedclip_small type biomedclip" in text
    assert f"file {small_biomedclip}/open_clip_pytorch_model.bin (" in text


def test_show_prints_the_cached_files_and_revision_of_a_repo(hub_cache, no_network):
    code, text = run("encoders", "show", BIOMEDCLIP)
    assert code == 0
    assert f"tower {BIOMEDCLIP} type biomedclip revision {REVISION}" in text
    assert f"{hub_cache[BIOMEDCLIP]}/open_clip_config.json" in text
    code, text = run("encoders", "show", OPENAI_CLIP)
    assert code == 0
    assert f"{hub_cache[OPENAI_CLIP]}/model.safetensors" in text


def test_show_says_what_to_fetch_or_what_is_missing(tmp_path, no_network):
    code, text = run("encoders", "show", "openai/clip-not-here")
    assert code == 0
    assert (
        "fetch hf download openai/clip-not-here config.json preprocessor_config.json "
        "model.safetensors" in text
    )
    code, text = run("encoders", "show", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere does not exist" in text
    code, text = run("encoders", "show", "someone/BiomedCLIP-like")
    assert code == 1
    assert (
        "hf download someone/BiomedCLIP-like open_clip_config.json open_clip_pytorch_model.bin"
        in text
    )


def test_encode_writes_the_tokens_and_names_of_a_folder(folder, small_biomedclip, tmp_path):
    out = tmp_path / "features.safetensors"
    code, text = run(
        "encode", folder, "--out", out, "--encoder", small_biomedclip, "--batch-size", 2
    )
    assert code == 0, text
    assert "5 images, 196 patch tokens of width 192" in text
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    names = json.loads(metadata["names"])
    assert names == ["0.png", "2.png", "4.png", "sub/1.png", "sub/3.png"]
    assert json.loads(metadata["tower"]) == "biomedclip_small"
    expected = create_encoder("biomedclip", small_biomedclip).encode(
        [folder / name for name in names]
    )
    assert torch.allclose(load_file(out)["patch_tokens"], expected, atol=1e-5)
    code, text = run("encode", folder, "--out", out, "--encoder", small_biomedclip)
    assert code == 1
    assert "already exists" in text


def test_encode_sets_any_option_of_the_encoder(folder, small_biomedclip, tmp_path):
    out = tmp_path / "features.safetensors"
    common = ("encode", folder, "--out", out, "--encoder", small_biomedclip)
    for words, message in (
        (("--set", "final_norm"), "'final_norm' is not a setting. Type key=value"),
        (("--select-layer", -1, "--set", "select_layer=-2"), "select_layer is given twice"),
        (("--set", "final_nrm=true"), "final_norm"),
    ):
        code, text = run(*common, *words)
        assert (code != 0, message in text) == (True, True), text
    code, text = run(*common, "--set", "final_norm=true")
    assert code == 0, text
    normed = create_encoder("biomedclip", small_biomedclip, final_norm=True)
    expected = normed.encode([folder / "0.png"])
    torch.testing.assert_close(load_file(out)["patch_tokens"][:1], expected, rtol=0, atol=1e-5)


def test_encode_says_what_is_wrong_with_a_folder(folder, small_biomedclip, tmp_path):
    options = ("--out", tmp_path / "f.safetensors", "--encoder", small_biomedclip)
    (tmp_path / "empty").mkdir()
    code, text = run("encode", tmp_path / "empty", *options)
    assert (code, "holds no image; looked for .png" in text) == (1, True)
    code, text = run("encode", tmp_path / "nowhere", *options)
    assert (code, "nowhere is not a folder" in text) == (1, True)
    (folder / "broken.png").write_bytes(b"x")
    code, text = run("encode", folder, *options)
    assert (code, "broken.png cannot be read as an image" in text) == (1, True)


def test_classify_prints_probabilities_best_first(hub_cache, folder, small_biomedclip, no_network):
    options = ("--labels", "chest x-ray, brain mri", "--encoder", small_biomedclip)
    code, text = run("classify", folder / "0.png", folder / "2.png", *options)
    assert code == 0, text
    numbers = [float(number) for number in re.findall(r"\b[01]\.\d{4}\b", text)]
    assert len(numbers) == 4
    assert numbers[0] >= numbers[1]
    assert numbers[0] + numbers[1] == pytest.approx(1, abs=2e-4)
    tower = create_encoder("biomedclip", small_biomedclip, load_text=True)
    expected = tower.zero_shot(folder / "0.png", ["chest x-ray", "brain mri"]).max()
    assert numbers[0] == pytest.approx(float(expected), abs=1e-4)


@pytest.fixture
def medical_folder(tmp_path):
    """A CT slice with and without a suffix, and a volume."""
    import shutil

    import nibabel
    from pydicom.data import get_testdata_file

    images = tmp_path / "medical"
    images.mkdir()
    for name in ("a.dcm", "IM0001"):
        shutil.copy(get_testdata_file("CT_small.dcm", download=False), images / name)
    volume = np.linspace(-1000, 1000, 8 * 9 * 10).reshape(8, 9, 10).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), images / "v.nii.gz")
    return images


def test_encode_takes_dicom_and_nifti_through_a_window(medical_folder, small_biomedclip, tmp_path):
    from moellava.images import to_pil

    out = tmp_path / "features.safetensors"
    options = ("--encoder", small_biomedclip, "--window", "lung")
    code, text = run("encode", medical_folder, "--out", out, *options)
    assert code == 0, text
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["names"]) == ["IM0001", "a.dcm", "v.nii.gz"]
    assert json.loads(metadata["view"]) == {"window": "lung"}
    pictures = [
        to_pil(medical_folder / name, window="lung") for name in json.loads(metadata["names"])
    ]
    expected = create_encoder("biomedclip", small_biomedclip).encode(pictures)
    tokens = load_file(out)["patch_tokens"]
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert torch.equal(tokens[0], tokens[1])


def test_encode_of_a_path_is_encode_of_its_picture(medical_folder, small_biomedclip):
    from moellava.images import load_image

    tower = create_encoder("biomedclip", small_biomedclip)
    for name in ("a.dcm", "v.nii.gz"):
        tokens = tower.encode(str(medical_folder / name))
        assert torch.allclose(tokens, tower.encode(load_image(medical_folder / name)), atol=1e-5)


def test_a_window_that_does_not_fit_is_said_before_anything_is_loaded(medical_folder, tmp_path):
    code, text = run(
        "classify",
        medical_folder / "a.dcm",
        "--labels",
        "a,b",
        "--window",
        "lnug",
        "--encoder",
        "none",
    )
    assert (code, "Unknown window 'lnug'. Did you mean 'lung'" in text) == (1, True)
    code, text = run(
        "classify", medical_folder / "a.dcm", "--labels", "a,b", "--frame", "3", "--encoder", "none"
    )
    assert (code, "has no frame 3: it has 1, 0 to 0" in text) == (1, True)


def test_encode_skips_a_structured_report_by_name(folder, small_biomedclip, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.ComprehensiveSRStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    report = pydicom.Dataset()
    report.file_meta = meta
    report.save_as(folder / "sub" / "report.dcm", enforce_file_format=True)
    out = tmp_path / "features.safetensors"
    code, text = run("encode", folder, "--out", out, "--encoder", small_biomedclip)
    assert code == 0, text
    assert "1 DICOM files without pixels are skipped: sub/report.dcm" in text
    assert "5 images" in text


def test_encode_says_which_precision_it_chose(folder, small_biomedclip, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    words = ["encode", folder, "--out", tmp_path / "out", "--encoder", small_biomedclip]
    code, text = run(*words, "--precision", "auto")
    assert code == 0, text
    assert "precision: bfloat16, this CPU multiplies bfloat16 (amx_bf16)" in text
    assert load_file(tmp_path / "out")["patch_tokens"].dtype == torch.bfloat16
    code, text = run(*words[:3], tmp_path / "other", *words[4:], "--precision", "half")
    assert code == 1
    assert "Unknown precision 'half'" in text

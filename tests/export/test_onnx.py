"""Graphs in onnxruntime against torch, for towers of each library and every projector."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from moellava.encoders import create_encoder
from moellava.export import export_onnx
from moellava.export.onnx import write_graph
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.projector import ProjectorShape, build_projector, projectors
from moellava.testing import TINYLLAMA
from tests.encoders.test_transformers import write_clip, write_siglip

SMALL = {
    "perceiver": {"num_latents": 4, "num_layers": 1},
    "qformer": {"num_query_tokens": 3, "num_layers": 1, "hidden_size": 64},
}


def run(path, value):
    session = onnxruntime.InferenceSession(str(path))
    (given,) = session.get_inputs()
    return session.run(None, {given.name: value.numpy()})[0]


def require_close(found, expected):
    assert np.abs(found - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("write", [write_clip, write_siglip])
def test_a_towers_graph_gives_its_patch_tokens_for_any_number_of_images(write, tmp_path):
    folder = tmp_path / write.__name__.removeprefix("write_")
    write(folder)
    written = export_onnx(folder, tmp_path / "out")
    assert list(written.differences) == ["vision_tower.onnx"]
    encoder = create_encoder(None, folder, dtype="float32")
    for num_images in (1, 5):
        pixels = torch.randn(num_images, 3, *encoder.config.image_hw)
        with torch.no_grad():
            expected = encoder(pixels).patch_tokens
        require_close(run(tmp_path / "out" / "vision_tower.onnx", pixels), expected)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", [*projectors(), "mlp2x_gelu"])
def test_every_projectors_graph_gives_its_embeddings(name, tmp_path):
    shape = ProjectorShape(vision_width=32, text_width=32, num_patches=16, grid=(4, 4))
    projector = build_projector(name, shape, SMALL.get(name)).eval()
    tokens = torch.randn(4, 16, 32)
    path = tmp_path / "projector.onnx"
    write_graph(projector, tokens[:3], path, names=("patch_tokens", "image_embeds"))
    for num_images in (1, 4):
        with torch.no_grad():
            expected = projector(tokens[:num_images])
        require_close(run(path, tokens[:num_images]), expected)


def test_both_graphs_of_a_saved_model_give_its_image_embeddings(small_biomedclip, tmp_path):
    parts = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": str(small_biomedclip)}
    loaded = load_pretrained_model(parts, projector_config={"type": "pixel_shuffle"})
    assert loaded.model.dtype == torch.bfloat16
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.processor.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    pixels = torch.randn(5, 3, 224, 224)
    tokens = run(tmp_path / "out" / "vision_tower.onnx", pixels)
    found = run(tmp_path / "out" / "projector.onnx", torch.from_numpy(tokens))
    exact = load_pretrained_model(tmp_path / "model", dtype="float32").model
    with torch.no_grad():
        expected = exact.get_image_features(pixels)
    require_close(tokens, expected.last_hidden_state)
    require_close(found, torch.stack(expected.pooler_output))


class Unexportable(nn.Module):
    def forward(self, tokens):
        return tokens * 2 if tokens.sum().item() > 0 else tokens


class ForTwoImages(nn.Module):
    def forward(self, tokens):
        return tokens * len(tokens)


class OtherWhenTraced(nn.Module):
    """Its graph computes something else."""

    def forward(self, tokens):
        return tokens * (1 if torch.compiler.is_exporting() else 1.001)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Unexportable(), r"projector \(Unexportable\) cannot be exported to ONNX"),
        (ForTwoImages(), r"projector \(ForTwoImages\) cannot be .* takes 2 images and no other"),
        (
            OtherWhenTraced(),
            r"projector \(OtherWhenTraced\): onnxruntime's output differs .* at most 1e-04",
        ),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_no_file(module, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_graph(module, torch.ones(3, 2), tmp_path / "projector.onnx", names=("x", "y"))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_and_full_folders_are_named(monkeypatch, small_biomedclip, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is there already"):
        export_onnx(small_biomedclip, tmp_path)
    monkeypatch.setattr("moellava.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'moellava\[onnx\]'"):
        export_onnx(small_biomedclip, tmp_path / "out")

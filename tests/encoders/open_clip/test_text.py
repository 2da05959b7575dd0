"""Text vectors and zero-shot probabilities against open_clip's own, on the same weights."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from moellava.encoders import BiomedClipEncoder
from moellava.testing import BIOMEDBERT, BIOMEDCLIP, in_fresh_memory
from moellava.testing.towers import write_biomedbert
from tests.encoders.conftest import open_clip_model

LABELS = ["chest x-ray", "brain mri", "a pie chart!"]
TEXTS = [f"this is a photo of {label}" for label in LABELS]


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (90 + i, 130, 3), dtype=np.uint8)) for i in range(3)
    ]


@torch.no_grad()
def open_clip_probabilities(repo) -> tuple[torch.Tensor, torch.Tensor]:
    """(text vectors, probabilities) as the model card of BiomedCLIP computes them."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{repo}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{repo}")
    pixels = torch.stack([preprocess(image) for image in images()])
    output = model.eval()(pixels, tokenizer(TEXTS))
    image_vectors, text_vectors, scale = output[:3]
    logits = scale * image_vectors @ text_vectors.T
    probabilities = (logits + output[3]).sigmoid() if len(output) > 3 else logits.softmax(-1)
    return text_vectors, probabilities


def copy_with(repo, folder, *, text_cfg=None, **files):
    """A copy of a repo, its text_cfg changed."""
    shutil.copytree(repo, folder, dirs_exist_ok=True)
    config = json.loads((folder / "open_clip_config.json").read_text())
    if text_cfg is not None:
        config["model_cfg"]["text_cfg"] = text_cfg(config["model_cfg"]["text_cfg"])
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_local_folder_gives_open_clips_probabilities_without_network(
    hub_cache, small_biomedclip, no_network
):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, load_text=True)
    text_vectors, probabilities = open_clip_probabilities(small_biomedclip)
    assert torch.equal(encoder.encode_text(TEXTS), text_vectors)
    assert torch.equal(encoder.zero_shot(images(), LABELS), probabilities)
    assert encoder.encode_text("one text").shape == (1, 512)
    assert torch.allclose(encoder.encode_text(TEXTS).norm(dim=-1), torch.ones(3))
    other = encoder.zero_shot(
        images(), LABELS, template="{}, an old woodcut"
    )  # the template matters
    assert not torch.allclose(other, probabilities)


@pytest.mark.real_size
@pytest.mark.slow
def test_hub_id_gives_open_clips_probabilities_without_network(hub_cache, no_network):
    encoder = BiomedClipEncoder.from_pretrained(BIOMEDCLIP, load_text=True)
    text_vectors, probabilities = open_clip_probabilities(hub_cache[BIOMEDCLIP])
    assert torch.equal(encoder.encode_text(TEXTS), text_vectors)
    assert torch.equal(encoder.zero_shot(images(), LABELS), probabilities)


def test_old_spellings_of_the_text_keys_give_the_same_vectors(
    hub_cache, small_biomedclip, tmp_path
):
    def old(text_cfg):
        text_cfg["proj"] = text_cfg.pop("hf_proj_type")
        text_cfg["pooler_type"] = text_cfg.pop("hf_pooler_type")
        return text_cfg

    encoder = BiomedClipEncoder.from_pretrained(
        copy_with(small_biomedclip, tmp_path, text_cfg=old), load_text=True
    )
    assert torch.equal(encoder.encode_text(TEXTS), open_clip_probabilities(small_biomedclip)[0])


def test_text_config_beside_the_weights_is_enough(small_biomedclip, tmp_path, no_network):
    def unknown(text_cfg):
        return text_cfg | {"hf_model_name": "someone/unseen-bert"}

    folder = copy_with(small_biomedclip, tmp_path / "copy", text_cfg=unknown)
    with pytest.raises(
        OSError, match=r"someone/unseen-bert, whose config\.json is not.*hf download.*text_config"
    ):
        BiomedClipEncoder.from_pretrained(folder, load_text=True)
    write_biomedbert(tmp_path / "bert")
    shutil.copy(tmp_path / "bert" / "config.json", folder / "text_config.json")
    encoder = BiomedClipEncoder.from_pretrained(folder, load_text=True)
    assert torch.equal(encoder.encode_text(TEXTS), open_clip_probabilities(small_biomedclip)[0])


def test_text_model_in_a_local_folder_is_read_there(small_biomedclip, tmp_path, no_network):
    write_biomedbert(tmp_path / "bert")

    def local(text_cfg):
        return text_cfg | {"hf_model_name": str(tmp_path / "bert")}

    folder = copy_with(small_biomedclip, tmp_path / "copy", text_cfg=local)
    encoder = BiomedClipEncoder.from_pretrained(folder, load_text=True)
    assert torch.equal(encoder.encode_text(TEXTS), open_clip_probabilities(folder)[0])


def test_no_path_of_this_machine_is_saved(small_biomedclip, tmp_path, no_network):
    write_biomedbert(tmp_path / "bert")
    place = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(tmp_path / "bert")}
    folder = copy_with(
        small_biomedclip, tmp_path / "copy", text_cfg=lambda text_cfg: text_cfg | place
    )
    encoder = BiomedClipEncoder.from_pretrained(folder, load_text=True)
    encoder.save_pretrained(tmp_path / "saved")
    assert encoder.config.text_cfg["hf_model_name"] == "bert"
    for file in (tmp_path / "saved").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name
    for name in ("bert", "copy"):
        (tmp_path / name).rename(tmp_path / f"{name}, gone")
    again = in_fresh_memory(BiomedClipEncoder.from_pretrained(tmp_path / "saved"))
    assert torch.equal(again.encode_text(TEXTS), in_fresh_memory(encoder).encode_text(TEXTS))


def test_biomedberts_published_config_needs_no_file():
    from transformers import BertConfig

    from moellava.encoders.open_clip.text import text_model_config
    from moellava.storage.sources import HubOptions, parse_source

    source = parse_source(
        "hf-hub:me/mine", HubOptions(cache_dir="no-such-cache", local_files_only=True)
    )
    state = {
        "text.transformer.embeddings.word_embeddings.weight": torch.empty(30522, 768, device="meta")
    }
    config = BertConfig(**text_model_config(BIOMEDBERT, source, state))
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 3072)
    with pytest.raises(OSError, match="not on this machine"):  # other sizes are not BERT-base
        text_model_config(BIOMEDBERT, source, {})


@pytest.mark.parametrize("name", ["vit", "vit_coca", "timm_small"])
def test_clips_own_text_tower_gives_open_clips_probabilities(architecture, name):
    repo = architecture(name)
    encoder = BiomedClipEncoder.from_pretrained(repo, load_text=True)
    model = open_clip_model(repo)
    ids = torch.randint(1, 60, (3, 16))
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.encode_text(ids), dim=-1)
        assert torch.allclose(encoder.text(ids), vectors, atol=1e-6)
    assert torch.equal(encoder.text.logit_scale, model.logit_scale)


def test_logit_bias_makes_probabilities_independent(architecture, tmp_path):
    repo = copy_with(architecture("vit"), tmp_path)
    state = torch.load(repo / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save(state | {"logit_bias": torch.tensor(-3.0)}, repo / "open_clip_pytorch_model.bin")
    encoder = BiomedClipEncoder.from_pretrained(repo, load_text=True)
    a, b = torch.eye(32)[:2], torch.eye(32)[:3]
    expected = (state["logit_scale"].exp() * a @ b.T - 3).sigmoid()
    assert torch.allclose(encoder.text.probabilities(a, b), expected)


def test_saved_encoder_with_text_reloads_with_its_tokenizer(
    hub_cache, small_biomedclip, tmp_path, no_network
):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, load_text=True)
    encoder.save_pretrained(tmp_path)
    for again in (AutoModel.from_pretrained(tmp_path), BiomedClipEncoder.from_pretrained(tmp_path)):
        expected = in_fresh_memory(encoder).zero_shot(images(), LABELS)
        assert torch.equal(in_fresh_memory(again).zero_shot(images(), LABELS), expected)


def test_without_text_the_error_says_how_to_load_it(small_biomedclip):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip)
    assert not [name for name, _ in encoder.named_parameters() if name.startswith("text")]
    for call in (lambda: encoder.encode_text(["x"]), lambda: encoder.zero_shot(images(), LABELS)):
        with pytest.raises(ValueError, match="without its text tower: load it with load_text=True"):
            call()


def test_wrong_labels_and_templates_are_refused(hub_cache, small_biomedclip):
    encoder = BiomedClipEncoder.from_pretrained(small_biomedclip, load_text=True)
    for labels in ("chest x-ray", []):
        with pytest.raises(ValueError, match="give a list of at least one label"):
            encoder.zero_shot(images(), labels)
    with pytest.raises(ValueError, match=r"needs a \{\} where the label goes"):
        encoder.zero_shot(images(), LABELS, template="a photo")


def test_missing_text_weights_are_an_error(hub_cache, small_biomedclip, tmp_path):
    folder = copy_with(small_biomedclip, tmp_path)
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    del state["text.proj.0.weight"]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"do not fit its configuration\. missing keys: tower\.proj\.0\.weight"
    ):
        BiomedClipEncoder.from_pretrained(folder, load_text=True)
    BiomedClipEncoder.from_pretrained(folder)  # the image tower is whole

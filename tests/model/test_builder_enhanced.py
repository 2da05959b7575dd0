import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from moellava.model.builder_enhanced import (
    CustomVisionConfig,
    load_pretrained_model,
    load_tokenizer,
    load_vision_encoder,
)
from moellava.model.describe import count_active_parameters
from moellava.testing import BIOMEDCLIP, OPENAI_CLIP, REVISION, TINYLLAMA

MISSION = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP, "mm_hidden_size": 768}


def chat_inputs(loaded, images, questions):
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": question}],
            }
        ]
        for image, question in zip(images, questions, strict=True)
    ]
    return loaded.processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@pytest.mark.usefixtures("hub_cache", "no_network")
class TestMission:
    def test_the_mapping_gives_the_four_parts(self):
        model, image_processor, tokenizer, context_len = load_pretrained_model(MISSION)
        assert type(model).__name__ == "MoeLlavaForConditionalGeneration"
        assert image_processor.crop_size["height"] == 224
        assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 32000
        assert context_len == 2048
        assert model.config.text_config.moe_layer_indices == [0, 2]
        assert model.dtype == torch.bfloat16
        assert not model.training

    def test_biomedclip_may_be_named_as_encoder_type(self):
        model = load_pretrained_model(MISSION, encoder_type="biomedclip").model
        assert model.config.vision_config.tower == BIOMEDCLIP

    def test_custom_vision_config_reaches_the_tower(self):
        custom = CustomVisionConfig(
            image_size=336, vision_feature_layer=-3, vision_feature_select_strategy="full"
        )
        loaded = load_pretrained_model(MISSION, custom_vision_config=custom)
        vision_config = loaded.model.config.vision_config
        assert (vision_config.image_size, vision_config.select_layer) == (336, -3)
        assert loaded.model.config.num_image_tokens == 21 * 21 + 1
        assert loaded.image_processor.crop_size["height"] == 336

    def test_load_vision_encoder_gives_the_tower_and_its_processor(self):
        encoder, image_processor = load_vision_encoder(
            MISSION, custom_vision_config=CustomVisionConfig()
        )
        assert (encoder.hidden_size, encoder.num_patches) == (768, 196)
        assert load_vision_encoder(BIOMEDCLIP)[0].config.tower == BIOMEDCLIP
        assert image_processor.image_mean[0] == pytest.approx(0.48145466)


def test_patch_tokens_equal_timm_and_differ_from_each_other(loaded, images, small_biomedclip):
    import timm

    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    stored = torch.load(small_biomedclip / "open_clip_pytorch_model.bin", weights_only=True)
    prefix = "visual.trunk."
    trunk.load_state_dict(
        {k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)}, strict=True
    )
    pixels = loaded.image_processor(images, return_tensors="pt")["pixel_values"]

    with torch.no_grad():
        ours = loaded.model.get_image_features(pixels, return_dict=True).last_hidden_state
        options = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
        (theirs,) = trunk.forward_intermediates(pixels, indices=[10], **options)
        (last,) = trunk.forward_intermediates(pixels, indices=[11], **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - last).abs().max() > 0.1  # the oracle can say no
    assert ours.std(dim=1).min() > 1e-3


@pytest.mark.parametrize("moe_config", [True, {"moe_layers": "dense", "num_experts": 3}, False])
def test_text_logits_equal_the_dense_llamas(parts, hub_cache, moe_config):
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = load_pretrained_model(parts, moe_config=moe_config, dtype="float32").model
    llama = LlamaForCausalLM.from_pretrained(TINYLLAMA, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(TINYLLAMA)(
        "Is there a fracture in the left hand?", return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = model(**ids).logits, llama(**ids).logits
    torch.testing.assert_close(ours[..., :32000], theirs, rtol=0, atol=2e-6)


def test_the_added_row_is_the_mean_of_the_others(loaded):
    for embedding in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
        weight = embedding.weight.detach()
        torch.testing.assert_close(weight[32000], weight[:32000].mean(0), rtol=0, atol=1e-4)


def test_same_seed_same_weights(parts):
    first, second, third = (
        load_pretrained_model(parts, seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    differing = {key for key in first if not torch.equal(first[key], third[key])}
    assert differing == {key for key in first if "projector" in key or ".gate.weight" in key}


RELOAD = """
import json, sys, torch
from moellava.testing import blocked_network
with blocked_network():
    from moellava import load_pretrained_model
    loaded = load_pretrained_model(sys.argv[1])
    inputs = torch.load(sys.argv[2], weights_only=True)
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    new = loaded.model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False)
    torch.save(logits, sys.argv[3])
    print(json.dumps(loaded.tokenizer.batch_decode(new)))
"""


def test_a_saved_and_moved_model_reloads_in_a_new_process_bit_for_bit(loaded, images, tmp_path):
    inputs = dict(chat_inputs(loaded, images, ["What is this?", "Is this a CT image?", "Why?"]))
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    text = loaded.tokenizer.batch_decode(
        loaded.model.generate(**inputs, max_new_tokens=8, max_length=None, do_sample=False)
    )
    loaded.model.save_pretrained(tmp_path / "first", max_shard_size="5MB")
    loaded.processor.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "saved")
    torch.save(inputs, tmp_path / "inputs.pt")

    empty_cache = {"HF_HUB_CACHE": str(tmp_path / "no-cache"), "HF_HUB_OFFLINE": "1"}
    script = [
        sys.executable,
        "-c",
        RELOAD,
        tmp_path / "saved",
        tmp_path / "inputs.pt",
        tmp_path / "logits.pt",
    ]
    import os

    output = subprocess.run(
        script, check=True, capture_output=True, text=True, env=os.environ | empty_cache
    ).stdout
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=1e-6, atol=1e-6)
    assert json.loads(output) == text
    saved_config = (tmp_path / "saved" / "config.json").read_text()
    assert str(tmp_path.parent) not in saved_config
    assert "moellava-hub-" not in saved_config, (
        "an absolute path of this machine is in the checkpoint"
    )


def test_a_batch_equals_its_prompts_one_by_one(loaded, images):
    questions = [
        "Is this a CT image?",
        "What modality is this, and which organ is shown in the left half of it?",
    ]
    batch = chat_inputs(loaded, images[:2], questions)
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["attention_mask"].shape[1]
    with torch.no_grad():
        batch_logits = loaded.model(**batch).logits
    for row, (image, question) in enumerate(zip(images, questions, strict=False)):
        single = chat_inputs(loaded, [image], [question])
        with torch.no_grad():
            logits = loaded.model(**single).logits[0]
        torch.testing.assert_close(batch_logits[row, -len(logits) :], logits, rtol=0, atol=1e-4)
    together = loaded.answer(images[:2], questions, max_new_tokens=10)
    assert together == [
        loaded.answer(i, q, max_new_tokens=10)[0] for i, q in zip(images, questions, strict=False)
    ]


def test_the_auto_classes_open_a_saved_model(loaded, tmp_path, images):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert type(processor) is type(loaded.processor)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, loaded.image_processor(images, return_tensors="pt")["pixel_values"])
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_object_or_dataclass_describes_a_model_as_a_mapping_does(parts):
    @dataclass
    class Description:
        model_name_or_path: str = parts["model_name_or_path"]
        mm_vision_tower: str = parts["mm_vision_tower"]

    for description in (Description(), SimpleNamespace(**parts)):
        assert load_pretrained_model(description).model.config.num_image_tokens == 196


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_describes_a_model_as_a_mapping_does(parts, suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_text(json.dumps(parts | {"projector_type": "linear"}))
    assert load_pretrained_model(path).model.config.projector_type == "linear"


def test_the_attention_implementation_reaches_the_language_model(parts, loaded, images, tmp_path):
    eager = load_pretrained_model(parts, dtype="float32", attn_implementation="eager")
    assert eager.model.config.text_config._attn_implementation == "eager"
    assert loaded.model.config.text_config._attn_implementation == "sdpa"
    inputs = chat_inputs(loaded, images[:1], ["Why?"])
    with torch.no_grad():
        torch.testing.assert_close(
            eager.model(**inputs).logits, loaded.model(**inputs).logits, rtol=0, atol=1e-4
        )


def test_a_saved_model_opens_by_its_hub_id_and_revision(loaded, tmp_path, no_network):
    commit, repo = "f" * 40, tmp_path / "models--me--chest-xray"
    loaded.model.save_pretrained(repo / "snapshots" / commit)
    loaded.processor.save_pretrained(repo / "snapshots" / commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    again = load_pretrained_model("me/chest-xray", revision=commit, **hub)
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    for options in ({"revision": "e" * 40}, {}):  # there is no "main" in this cache
        with pytest.raises(OSError, match="me/chest-xray"):
            load_pretrained_model("me/chest-xray", **options, **hub)


def test_the_revision_of_the_language_model_is_looked_for_and_recorded(parts):
    assert (
        load_pretrained_model(parts, revision=REVISION).model.config.language_model_revision
        == REVISION
    )
    with pytest.raises(OSError, match=TINYLLAMA):
        load_pretrained_model(parts, revision="e" * 40)


def test_the_device_is_where_the_model_goes(parts):
    assert load_pretrained_model(parts, device="meta").model.device.type == "meta"


@pytest.mark.parametrize(
    ("moe_config", "language_model"),
    [
        (True, "llama_moe: 2 of 4 layers are mixtures of 4 experts, top-2"),
        (False, "llama: dense, 4 layers"),
    ],
)
def test_one_line_each_tells_tower_projector_language_model_and_size(
    parts, caplog, tmp_path, moe_config, language_model
):
    caplog.set_level("INFO", logger="moellava")
    loaded = load_pretrained_model(parts, moe_config=moe_config)
    told = [list(caplog.messages)]
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    caplog.clear()
    load_pretrained_model(tmp_path)
    told.append(list(caplog.messages))
    size = f"{loaded.model.num_parameters()} parameters, {count_active_parameters(loaded.model)} active per token"
    beginnings = (
        "tower biomedclip_small",
        "projector mlp2x_gelu: 196 image tokens",
        "language model ",
        size,
    )
    for messages in told:
        assert [sum(message.startswith(start) for message in messages) for start in beginnings] == [
            1
        ] * 4, messages
        assert f"language model {language_model}" in messages


def test_device_map_opens_a_saved_model(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    spread = load_pretrained_model(tmp_path, device_map={"": "cpu"})
    assert all(
        torch.equal(a, b)
        for a, b in zip(spread.model.parameters(), loaded.model.parameters(), strict=True)
    )


def test_a_broken_tower_falls_back_only_on_request(parts, hub_cache, tmp_path, caplog):
    (tmp_path / "biomedclip_broken").mkdir()
    broken = parts | {"mm_vision_tower": str(tmp_path / "biomedclip_broken")}
    with pytest.raises((OSError, ValueError), match="biomedclip_broken"):
        load_pretrained_model(broken, encoder_type="biomedclip")
    model = load_pretrained_model(broken, encoder_type="biomedclip", fallback_to_default=True).model
    assert model.config.vision_config.tower == BIOMEDCLIP
    assert "INSTEAD" in caplog.text


class TestProgress:
    def test_no_bar_unless_asked(self, parts, capfd):
        load_pretrained_model(parts)
        assert capfd.readouterr().err == ""
        load_pretrained_model(parts, progress=True)
        shown = capfd.readouterr().err
        assert "Upcycling weights" in shown
        assert "Loading weights" in shown

    @pytest.mark.parametrize("before", [True, False])
    def test_transformers_and_the_hubs_own_settings_are_left_as_they_were(self, parts, before):
        from huggingface_hub.utils import are_progress_bars_disabled
        from transformers.utils import logging

        try:
            (logging.enable_progress_bar if before else logging.disable_progress_bar)()
            with pytest.raises(ValueError, match="Unknown key"):
                load_pretrained_model(parts | {"x": 1}, progress=not before)
            assert logging.is_progress_bar_enabled() == before
            assert are_progress_bars_disabled() != before
        finally:
            logging.enable_progress_bar()


class TestBadInput:
    def test_a_missing_tower_is_named(self, hub_cache):
        with pytest.raises(OSError, match="microsoft/NoSuchBiomedCLIP"):
            load_pretrained_model(MISSION | {"mm_vision_tower": "microsoft/NoSuchBiomedCLIP"})

    def test_a_missing_language_model_is_named_with_the_command_that_fetches_it(self, hub_cache):
        with pytest.raises(
            OSError, match=r"(?s)'nobody/no-llama' is found.*hf download nobody/no-llama"
        ):
            load_pretrained_model(MISSION | {"model_name_or_path": "nobody/no-llama"})

    def test_an_unknown_key_suggests_the_nearest(self, parts):
        with pytest.raises(
            ValueError, match=r"'mm_vision_towr'\. Did you mean 'mm_vision_tower'\?"
        ):
            load_pretrained_model({"mm_vision_towr": "x", "model_name_or_path": TINYLLAMA})

    def test_a_missing_key_is_named(self, parts):
        with pytest.raises(ValueError, match=r"no 'mm_vision_tower'.*Found: model_name_or_path"):
            load_pretrained_model({"model_name_or_path": TINYLLAMA})

    def test_a_wrong_mm_hidden_size_names_both_widths(self, parts):
        with pytest.raises(
            ValueError, match=r"mm_hidden_size is 512, but .* width 192\. Set mm_hidden_size=192"
        ):
            load_pretrained_model(parts | {"mm_hidden_size": 512})

    def test_a_contradiction_names_both_values(self, parts):
        with pytest.raises(
            ValueError, match=r"'clip' in the model description and 'biomedclip' in the argument"
        ):
            load_pretrained_model(parts | {"encoder_type": "clip"}, encoder_type="biomedclip")
        with pytest.raises(
            ValueError, match=r"vision_feature_layer is -3 .* and -2 in custom_vision_config"
        ):
            load_pretrained_model(
                parts | {"mm_vision_select_layer": -3}, custom_vision_config=CustomVisionConfig()
            )

    def test_a_folder_that_is_no_checkpoint_says_what_it_holds(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(
            OSError, match=r"no checkpoint: it has no config.json \(found: notes.txt\)"
        ):
            load_pretrained_model(tmp_path)

    def test_a_language_model_alone_is_no_saved_model(self, hub_cache):
        with pytest.raises(ValueError, match=r"'llama' checkpoint.*'mm_vision_tower'"):
            load_pretrained_model(TINYLLAMA)

    def test_a_vision_tower_is_no_language_model(self, parts, hub_cache):
        with pytest.raises(ValueError, match="'clip'"):
            load_pretrained_model(parts | {"model_name_or_path": OPENAI_CLIP})

    def test_parts_of_a_saved_model_are_fixed(self, tmp_path):
        with pytest.raises(ValueError, match="parts are fixed"):
            load_pretrained_model(tmp_path, encoder_type="biomedclip")

    def test_a_checkpoint_without_one_tensor_is_refused(self, loaded, tmp_path):
        from safetensors.torch import load_file, save_file

        loaded.model.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state["model.vision_tower.visual.trunk.cls_token"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"missing keys: model\.vision_tower\.visual\.trunk\.cls_token"
        ):
            load_pretrained_model(tmp_path)

    @pytest.fixture
    def sharded(self, loaded, tmp_path):
        loaded.model.save_pretrained(tmp_path, max_shard_size="10MB")
        loaded.processor.save_pretrained(tmp_path)
        return tmp_path

    def test_a_missing_shard_is_named(self, sharded):
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            load_pretrained_model(sharded)

    def test_a_half_written_shard_is_named(self, sharded):
        shard = sorted(sharded.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-1000])
        with pytest.raises((OSError, ValueError), match=shard.name):
            load_pretrained_model(sharded)

    def test_a_folder_without_weights_is_refused(self, loaded, tmp_path):
        loaded.model.config.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load_pretrained_model(tmp_path)

    def test_a_wrong_description_type_says_what_is_expected(self):
        with pytest.raises(TypeError, match="is a int; give a mapping"):
            load_pretrained_model(3)

    def test_a_description_file_that_is_none_is_refused(self, tmp_path):
        (tmp_path / "a.yaml").write_text("{")
        with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
            load_pretrained_model(tmp_path / "a.yaml")
        (tmp_path / "b.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"b\.json holds a list"):
            load_pretrained_model(tmp_path / "b.json")

    def test_device_and_device_map_exclude_each_other(self, parts):
        with pytest.raises(ValueError, match="device is 'cpu' and device_map is 'auto'"):
            load_pretrained_model(parts, device="cpu", device_map="auto")
        with pytest.raises(ValueError, match="device_map is for a saved model"):
            load_pretrained_model(parts, device_map="auto")

    def test_an_integer_dtype_is_refused(self, parts):
        with pytest.raises(ValueError, match=r"dtype is 'int8'; give torch\.float32"):
            load_pretrained_model(parts, dtype="int8")

    def test_load_tokenizer_names_the_place(self, tmp_path):
        with pytest.raises(OSError, match="No tokenizer can be read"):
            load_tokenizer(tmp_path)


def test_open_clip_missing_says_what_to_install(monkeypatch, parts):
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_pretrained_model(parts)

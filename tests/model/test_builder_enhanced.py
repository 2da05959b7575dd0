import sys

import pytest
import torch

from moellava.model.builder_enhanced import (
    CustomVisionConfig,
    load_pretrained_model,
    load_vision_encoder,
)
from moellava.model.describe import count_active_parameters
from moellava.testing import BIOMEDCLIP, TINYLLAMA
from tests.model.prompts import chat_inputs

MISSION = {"model_name_or_path": TINYLLAMA, "mm_vision_tower": BIOMEDCLIP, "mm_hidden_size": 768}


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


def test_the_attention_implementation_reaches_the_language_model(parts, loaded, images, tmp_path):
    eager = load_pretrained_model(parts, dtype="float32", attn_implementation="eager")
    assert eager.model.config.text_config._attn_implementation == "eager"
    assert loaded.model.config.text_config._attn_implementation == "sdpa"
    inputs = chat_inputs(loaded, images[:1], ["Why?"])
    with torch.no_grad():
        torch.testing.assert_close(
            eager.model(**inputs).logits, loaded.model(**inputs).logits, rtol=0, atol=1e-4
        )


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
    active = count_active_parameters(loaded.model)
    size = f"{loaded.model.num_parameters()} parameters, {active} active per token"
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

    def test_device_and_device_map_exclude_each_other(self, parts):
        with pytest.raises(ValueError, match="device is 'cpu' and device_map is 'auto'"):
            load_pretrained_model(parts, device="cpu", device_map="auto")
        with pytest.raises(ValueError, match="device_map is for a saved model"):
            load_pretrained_model(parts, device_map="auto")


def test_open_clip_missing_says_what_to_install(monkeypatch, parts):
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load_pretrained_model(parts)

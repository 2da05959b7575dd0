"""Other language models and towers than TinyLlama and BiomedCLIP: dense, mixtures, plain configs of
transformers.
"""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from moellava import LlamaMoeConfig, MoeLlavaConfig, MoeLlavaForConditionalGeneration
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.difference import load_trainable, save_trainable
from moellava.testing import SMOLLM2, TINYLLAMA, in_fresh_memory

TEXT = {
    "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
DENSE = {"mistral": MistralConfig, "qwen2": Qwen2Config, "llama": LlamaConfig}
TOWERS = {
    "CLIPVisionConfig": CLIPVisionConfig(**TOWER),
    "SiglipVisionConfig": SiglipVisionConfig(**TOWER),
    "Dinov2Config": Dinov2Config(**TOWER),
}


def write_language_model(folder, config, hub_cache):
    """Random weights, TinyLlama's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(hub_cache[TINYLLAMA]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
class TestDenseLanguageModels:
    @pytest.fixture
    def folder(self, name, hub_cache, tmp_path):
        return write_language_model(tmp_path / name, DENSE[name](**TEXT), hub_cache)

    def test_text_logits_are_its_own_and_it_answers_saves_and_reloads(
        self, parts, folder, images, tmp_path
    ):
        from transformers import AutoModelForCausalLM

        loaded = load_pretrained_model(
            parts | {"model_name_or_path": str(folder)}, moe_config=False, dtype="float32"
        )
        ids = loaded.tokenizer("Is there a fracture?", return_tensors="pt")
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**ids).logits
            torch.testing.assert_close(
                loaded.model(**ids).logits[..., :32000], theirs, rtol=0, atol=2e-6
            )
        answer = loaded.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=5)
        loaded.model.save_pretrained(tmp_path / "saved")
        loaded.processor.save_pretrained(tmp_path / "saved")
        again = load_pretrained_model(tmp_path / "saved")
        assert again.model.config.text_config.model_type == folder.name
        assert (
            again.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=5) == answer
        )

    def test_as_a_mixture_it_is_refused_with_the_way_out(self, parts, folder, name):
        with pytest.raises(ValueError, match=rf"model_type '{name}'.*moe_config=False"):
            load_pretrained_model(parts | {"model_name_or_path": str(folder)})


class TestConfigsOfTransformers:
    @pytest.mark.parametrize("vision", TOWERS)
    @pytest.mark.parametrize("text", ["mistral", "qwen2", "llama_moe"])
    def test_a_model_from_plain_configs_runs_generates_and_comes_back(self, vision, text, tmp_path):
        text_config = LlamaMoeConfig(**TEXT) if text == "llama_moe" else DENSE[text](**TEXT)
        config = MoeLlavaConfig(
            vision_config=TOWERS[vision], text_config=text_config, image_token_id=7
        )
        assert config.num_image_tokens == 4
        torch.manual_seed(0)
        model = MoeLlavaForConditionalGeneration(config).eval()
        assert (
            model.get_vision_tower()
            is model.get_model().get_vision_tower()
            is model.model.vision_tower
        )
        inputs = {
            "input_ids": torch.tensor([[1, 7, 7, 7, 7, 9, 11]]),
            "pixel_values": torch.randn(1, 3, 28, 28),
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits
            assert (
                logits - model(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits
            ).abs().max() > 1e-4
        new = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert new.shape[1] > 7
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        with torch.no_grad():
            # What the guides claim for any memory; and the bits, in memory of equal alignment.
            torch.testing.assert_close(again(**inputs).logits, logits, rtol=1e-6, atol=1e-6)
            expected = in_fresh_memory(model)(**inputs).logits
            assert torch.equal(in_fresh_memory(again)(**inputs).logits, expected)

    @pytest.mark.parametrize("vision", TOWERS)
    def test_the_patch_tokens_are_the_towers_own_hidden_states(self, vision):
        from transformers import AutoModel

        model = MoeLlavaForConditionalGeneration(
            MoeLlavaConfig(
                vision_config=TOWERS[vision].to_dict(),
                text_config=MistralConfig(**TEXT),
                image_token_id=7,
            )
        ).eval()
        tower = AutoModel.from_config(TOWERS[vision]).eval()
        tower.load_state_dict(model.get_vision_tower().tower.state_dict())
        pixels = torch.randn(1, 3, 28, 28)
        with torch.no_grad():
            ours = model.get_image_features(pixels, return_dict=True).last_hidden_state
            theirs = tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours, theirs[:, -4:], rtol=0, atol=1e-5)

    def test_a_tower_that_no_encoder_reads_is_refused(self):
        from transformers import ViTConfig

        with pytest.raises(
            ValueError,
            match=r"model_type 'vit', which no image encoder reads\. Known: .*clip_vision",
        ):
            MoeLlavaConfig(vision_config=ViTConfig(), text_config=LlamaConfig(**TEXT))


class TestMixtures:
    """Language models that are mixtures already go in as they are."""

    @pytest.fixture
    def mixtral(self, hub_cache, tmp_path):
        config = MixtralConfig(**TEXT, num_local_experts=4, sliding_window=None)
        return write_language_model(tmp_path / "mixtral", config, hub_cache)

    def test_mixtral_keeps_its_logits_and_saves_as_a_difference(
        self, parts, mixtral, images, tmp_path
    ):
        from transformers import AutoModelForCausalLM

        request = parts | {"model_name_or_path": str(mixtral)}
        loaded = load_pretrained_model(request, dtype="float32")
        assert loaded.model.config.text_config.model_type == "llama_moe"
        ids = loaded.tokenizer("Is there a fracture?", return_tensors="pt")
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)(
                **ids
            ).logits
            torch.testing.assert_close(
                loaded.model(**ids).logits[..., :32000], theirs, rtol=0, atol=1e-5
            )
        names = save_trainable(loaded, tmp_path / "difference")
        assert not any("experts" in name for name in names)
        again = load_trainable(tmp_path / "difference", base={key: request[key] for key in parts})
        with torch.no_grad():
            expected = in_fresh_memory(loaded.model)(**ids).logits
            assert torch.equal(in_fresh_memory(again.model)(**ids).logits, expected)

    def test_moe_llavas_mixture_is_read(self, parts, hub_cache, tmp_path):
        from moellava import LlamaMoeForCausalLM
        from tests.model.language_model.test_mixtures import write_moe_llava

        torch.manual_seed(0)
        mixture = LlamaMoeForCausalLM(LlamaMoeConfig(**TEXT, moe_layers=[0])).eval()
        folder = tmp_path / "moe-llava"
        write_moe_llava(folder, TEXT, mixture.state_dict(), layers=[0], top_k=2)
        AutoTokenizer.from_pretrained(hub_cache[TINYLLAMA]).save_pretrained(folder)
        loaded = load_pretrained_model(parts | {"model_name_or_path": str(folder)}, dtype="float32")
        assert loaded.model.config.text_config.moe_layer_indices == [0]
        ids = loaded.tokenizer("Is there a fracture?", return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.model(**ids).logits[..., :32000], mixture(**ids).logits
            )

    def test_our_own_mixture_is_read_and_leaves_nothing_to_choose(self, parts, hub_cache, tmp_path):
        from moellava.model.language_model import upcycle

        mixture = upcycle(TINYLLAMA, num_experts=3, noise=0.1, dtype=torch.float32)
        mixture.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(hub_cache[TINYLLAMA]).save_pretrained(tmp_path)
        request = parts | {"model_name_or_path": str(tmp_path)}
        text_model = load_pretrained_model(request).model.model.language_model
        state = mixture.model.state_dict()
        assert torch.equal(
            text_model.layers[0].mlp.experts.down_proj, state["layers.0.mlp.experts.down_proj"]
        )
        with pytest.raises(
            ValueError, match=r"is already a mixture of experts \('llama_moe'\).*moe_config=False"
        ):
            load_pretrained_model(request, moe_config=False)

    def test_how_the_experts_are_made_is_part_of_moe_config(self, parts, hub_cache):
        router = {"weight": torch.randn(3, 64)}
        options = {
            "num_experts": 3,
            "noise": 0.1,
            "router": router,
            "norm_topk_prob": False,
            "keep_function": False,
        }
        model = load_pretrained_model(parts, moe_config=options, dtype="float32").model
        block = model.model.language_model.layers[0].mlp
        assert torch.equal(block.gate.weight, router["weight"])
        assert not torch.equal(block.experts.down_proj[0], block.experts.down_proj[1])
        with pytest.raises(
            ValueError, match=r"Unknown mixture option 'nois'\. Did you mean 'noise'"
        ):
            load_pretrained_model(parts, moe_config={"nois": 0.1})
        with pytest.raises(ValueError, match="keep_function=False"):
            load_pretrained_model(parts, moe_config={"norm_topk_prob": False})


def test_the_config_of_transformers_survives_a_file(tmp_path):
    config = MoeLlavaConfig(
        vision_config=TOWERS["CLIPVisionConfig"], text_config=Qwen2Config(**TEXT), image_token_id=7
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (
        json.loads((tmp_path / "config.json").read_text())["vision_config"]["model_type"]
        == "moellava_clip_vision"
    )


class TestSmolLM2:
    """Tied embeddings, 49152 tokens, ChatML turns with a default system prompt, no <s> in front,
    pad = end of turn.
    """

    @pytest.fixture(scope="class")
    def loaded(self, small_biomedclip, hub_cache):
        request = {"model_name_or_path": SMOLLM2, "mm_vision_tower": str(small_biomedclip)}
        return load_pretrained_model(request, dtype="float32")

    def test_it_becomes_a_mixture_with_the_same_logits(self, loaded):
        from transformers import LlamaForCausalLM

        ids = loaded.tokenizer("Is there a fracture?", return_tensors="pt")
        with torch.no_grad():
            theirs = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)(**ids).logits
            ours = loaded.model(**ids).logits
        torch.testing.assert_close(ours[..., :49152], theirs, rtol=0, atol=2e-6)
        assert loaded.model.config.text_config.moe_layer_indices == [0, 2]
        assert loaded.tokenizer.convert_tokens_to_ids("<image>") == 49152 == ours.shape[-1] - 1

    def test_embeddings_stay_tied_and_are_saved_once(self, loaded, tmp_path, images):
        from safetensors import safe_open

        assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
        answer = loaded.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=6)
        loaded.model.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert sum(49153 in file.get_slice(name).get_shape() for name in file.keys()) == 1  # noqa: SIM118
        again = load_pretrained_model(tmp_path)
        assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
        assert (
            again.answer(images[:2], ["Why?", "Which organ is shown?"], max_new_tokens=6) == answer
        )

    def test_a_chat_has_one_start_the_default_system_prompt_and_196_placeholders(
        self, loaded, images
    ):
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": images[0]},
                    {"type": "text", "text": "Why?"},
                ],
            }
        ]
        inputs = loaded.processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        text = loaded.tokenizer.decode(inputs["input_ids"][0]).replace("<image>" * 196, "<image>")
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_one_training_step_learns_the_answer_and_its_end(
        self, small_biomedclip, hub_cache, images, tmp_path
    ):
        from moellava.data.collate import ChatCollator

        request = {"model_name_or_path": SMOLLM2, "mm_vision_tower": str(small_biomedclip)}
        loaded = load_pretrained_model(request, dtype="float32")
        content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}]
        row = {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": "yes"},
            ]
        }
        batch = ChatCollator(loaded.processor)([row])
        learned = batch["labels"][batch["labels"] != -100]
        assert loaded.tokenizer.decode(learned) == "yes<|im_end|>"
        model = loaded.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        before = model(**batch).loss
        before.backward()
        optimizer.step()
        assert model(**batch).loss < before
        model.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
        again = load_pretrained_model(tmp_path).model
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

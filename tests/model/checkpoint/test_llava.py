import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from moellava.data.collate import ChatCollator
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.checkpoint.llava import read_mm_projector
from moellava.model.projector import ProjectorShape, build_projector
from moellava.testing import in_fresh_memory, write_llava, write_llava_next


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava") / "llava-tiny")


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A lung."}]}
PROMPTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: <image>\n<image>\nIs there a fracture in one of them, or in both of them? ASSISTANT:",
    "USER: <image>\nWhich? <image>\nWhich? <image>\nWhich of the three? ASSISTANT:",
]
NUM_IMAGES = [1, 2, 3]


def batch_of(processor, images, padding_side="left"):
    pictures = [images[:count] for count in NUM_IMAGES]
    return processor(
        text=PROMPTS, images=pictures, padding=True, padding_side=padding_side, return_tensors="pt"
    )


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


class TestLogits:
    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_dense_logits_equal_transformers_llava_for_one_to_three_images(
        self, llava, images, padding_side
    ):
        theirs = LlavaForConditionalGeneration.from_pretrained(llava).eval()
        ours = load_pretrained_model(llava, moe_config=False)
        batch = batch_of(LlavaProcessor.from_pretrained(llava), images, padding_side)
        own_batch = batch_of(ours.processor, images, padding_side)
        assert batch["attention_mask"].sum(1).unique().numel() == 3
        for key in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(batch[key], own_batch[key]), key
        is_token = batch["attention_mask"].bool()
        expected, found = (
            logits_of(theirs, batch)[is_token],
            logits_of(ours.model, own_batch)[is_token],
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

        blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
        assert (
            logits_of(ours.model, blank)[is_token] - expected
        ).abs().max() > 1e-3  # the oracle can say no

    def test_by_default_the_language_model_becomes_a_mixture_with_the_same_logits(
        self, llava, images
    ):
        theirs = LlavaForConditionalGeneration.from_pretrained(llava).eval()
        ours = load_pretrained_model(llava)
        assert ours.model.config.text_config.moe_layer_indices == [0, 2]
        batch = batch_of(ours.processor, images)
        is_token = batch["attention_mask"].bool()
        expected, found = logits_of(theirs, batch)[is_token], logits_of(ours.model, batch)[is_token]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_mixture_options_are_taken(self, llava):
        model = load_pretrained_model(
            llava, moe_config={"moe_layers": [3], "num_experts": 2}, dtype="bfloat16"
        ).model
        assert model.config.text_config.moe_layer_indices == [3]
        assert model.model.language_model.layers[3].mlp.experts.down_proj.shape[0] == 2
        assert model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "options",
        [
            {"vision_feature_layer": -1},
            {"vision_feature_layer": 2},
            {"vision_feature_layer": [-2, -3]},
            {"vision_feature_select_strategy": "full"},
            {"text": {"tie_word_embeddings": True}},
        ],
    )
    def test_other_settings_of_llava_keep_their_meaning(self, tmp_path, images, options):
        folder = write_llava(tmp_path, **options)
        theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        for moe_config in (False, True):
            ours = load_pretrained_model(folder, moe_config=moe_config)
            batch = batch_of(ours.processor, images)
            is_token = batch["attention_mask"].bool()
            expected, found = (
                logits_of(theirs, batch)[is_token],
                logits_of(ours.model, batch)[is_token],
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_answers_equal_what_transformers_llava_generates(self, llava, images):
        theirs = LlavaForConditionalGeneration.from_pretrained(llava).eval()
        ours = load_pretrained_model(llava, moe_config=False)
        processor = LlavaProcessor.from_pretrained(llava)
        conversation = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
            }
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        batch = processor(text=[text], images=[images[0]], return_tensors="pt")
        new = theirs.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=32001)
        expected = processor.batch_decode(
            new[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert ours.answer(images[0], "What is this?", max_new_tokens=8) == [expected[0].strip()]


def test_a_hub_id_works_offline_and_is_recorded_as_the_tower(tmp_path, monkeypatch, no_network):
    commit = "f" * 40
    repo = tmp_path / "models--llava-hf--llava-tiny"
    write_llava(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    vision = load_pretrained_model(
        "llava-hf/llava-tiny", cache_dir=tmp_path
    ).model.config.vision_config
    assert (vision.tower, vision.revision) == ("llava-hf/llava-tiny", commit)


def test_the_result_saves_and_reloads_as_any_other_model(llava, images, tmp_path):
    ours = load_pretrained_model(llava)
    ours.model.save_pretrained(tmp_path)
    ours.processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path)
    batch = batch_of(ours.processor, images)
    first, second = in_fresh_memory(ours.model), in_fresh_memory(again.model)
    found = logits_of(second, batch)
    assert torch.equal(found, logits_of(first, batch_of(again.processor, images)))
    assert str(llava.parent) not in (tmp_path / "config.json").read_text()


def test_bfloat16_stays_bfloat16_with_float32_routers(tmp_path):
    model = load_pretrained_model(write_llava(tmp_path, dtype=torch.bfloat16)).model
    dtypes = {name.rsplit(".", 2)[-2]: weight.dtype for name, weight in model.named_parameters()}
    assert model.dtype == torch.bfloat16
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"gate"}


class TestProjectorFiles:
    SHAPE = ProjectorShape(vision_width=8, text_width=12, num_patches=4, grid=(2, 2))

    def original_llava_projector(self):
        """LLaVA's own construction (llava/model/multimodal_projector/builder.py): Linear, GELU,
        Linear.
        """
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 12))

    @pytest.mark.parametrize(
        "prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", ""]
    )
    def test_mm_projector_bin_loads_into_ours(self, tmp_path, prefix):
        theirs = self.original_llava_projector()
        torch.save(
            {f"{prefix}{key}": value for key, value in theirs.state_dict().items()},
            tmp_path / "mm_projector.bin",
        )
        ours = build_projector("mlp2x_gelu", self.SHAPE)
        ours.load_state_dict(read_mm_projector(tmp_path))
        tokens = torch.randn(2, 4, 8)
        assert torch.equal(ours(tokens), theirs(tokens))

    def test_a_single_linear_layer_loads(self, tmp_path):
        weight, bias = torch.randn(12, 8), torch.randn(12)
        path = tmp_path / "mm_projector.bin"
        torch.save({"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}, path)
        ours = build_projector("linear", self.SHAPE)
        ours.load_state_dict(read_mm_projector(path))
        assert torch.equal(ours.weight, weight)

    def test_other_trained_weights_beside_the_projector_are_left_out(self, tmp_path):
        state = {
            f"base_model.model.model.mm_projector.{k}": v
            for k, v in self.original_llava_projector().state_dict().items()
        }
        path = tmp_path / "non_lora_trainables.bin"
        torch.save(state | {"base_model.model.model.embed_tokens.weight": torch.zeros(3, 12)}, path)
        assert sorted(read_mm_projector(path)) == ["0.bias", "0.weight", "2.bias", "2.weight"]

    def test_the_projector_of_a_transformers_llava_loads(self, llava):
        found = read_mm_projector(llava / "model.safetensors")
        model = load_pretrained_model(llava, moe_config=False).model
        expected = model.model.multi_modal_projector.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_a_file_without_projector_says_what_it_holds(self, tmp_path):
        torch.save(
            {"model.layers.0.mlp.gate_proj.weight": torch.zeros(1)}, tmp_path / "mm_projector.bin"
        )
        with pytest.raises(
            ValueError, match=r"no projector.*model\.mm_projector\.0\.weight.*model\.layers\.0"
        ):
            read_mm_projector(tmp_path)

    def test_a_missing_file_names_what_is_looked_for(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"No projector at .*mm_projector\.bin"):
            read_mm_projector(tmp_path)

    def test_a_pickle_that_runs_code_is_not_opened(self, tmp_path):
        torch.save({"model.mm_projector.0.weight": shutil.rmtree}, tmp_path / "mm_projector.bin")
        with pytest.raises(ValueError, match="not opened"):
            read_mm_projector(tmp_path)


class TestNext:
    """LLaVA-NeXT: tiles, of which what shows padding is left out, and a learned row end."""

    @pytest.fixture(scope="class")
    def llava_next(self, tmp_path_factory):
        return write_llava_next(tmp_path_factory.mktemp("llava") / "next")

    @pytest.fixture(scope="class")
    def pictures(self):
        rng = np.random.default_rng(0)
        sizes = [(100, 300), (300, 120), (90, 91), (40, 30), (3, 900), (1000, 400)]
        return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]

    @staticmethod
    def batches(llava_next, ours, pictures, padding_side="left"):
        rows = [pictures[:1], pictures[1:3], pictures[3:]]
        options = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        processors = LlavaNextProcessor.from_pretrained(llava_next), ours.processor
        return [processor(text=PROMPTS, images=rows, **options) for processor in processors]

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    def test_logits_equal_transformers_for_images_of_several_sizes(
        self, llava_next, pictures, padding_side
    ):
        theirs = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
        ours = load_pretrained_model(llava_next, moe_config=False)
        batch, own_batch = self.batches(llava_next, ours, pictures, padding_side)
        for key in ("input_ids", "attention_mask", "image_sizes"):
            assert torch.equal(batch[key], own_batch[key]), key
        is_token = batch["attention_mask"].bool()
        expected = logits_of(theirs, batch)[is_token]
        found = logits_of(ours.model, own_batch)[is_token]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            ours.model.model.image_newline.zero_()
        assert (logits_of(ours.model, own_batch)[is_token] - expected).abs().max() > 1e-3

    def test_answers_equal_what_transformers_generates_with_beams_too(self, llava_next, pictures):
        theirs = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
        ours = load_pretrained_model(llava_next, moe_config=False)
        batch, own_batch = self.batches(llava_next, ours, pictures)
        for beams in (1, 2):
            options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
            expected = theirs.generate(**batch, **options)
            assert torch.equal(ours.model.generate(**own_batch, **options), expected)

    def test_every_way_of_asking_agrees_and_it_reloads(self, llava_next, pictures, tmp_path):
        ours = load_pretrained_model(llava_next)
        assert ours.model.config.text_config.model_type == "llama_moe"
        question, new = "What is this?", {"max_new_tokens": 6}
        expected = [ours.answer(picture, question, **new)[0] for picture in pictures]
        assert ours.answer(pictures, [question] * len(pictures), **new) == expected
        content = [{"type": "image", "image": pictures[1]}, {"type": "text", "text": question}]
        assert ours.chat([{"role": "user", "content": content}], **new) == expected[1]
        batch = ChatCollator(ours.processor)(
            [
                {"messages": [{"role": "user", "content": content}, ANSWER]},
                {"messages": [{"role": "user", "content": [*content[:1], *content]}, ANSWER]},
            ]
        )
        assert batch["image_sizes"].tolist() == [[300, 120]] * 3
        assert torch.isfinite(ours.model(**batch).loss)
        ours.model.save_pretrained(tmp_path)
        ours.processor.save_pretrained(tmp_path)
        again = load_pretrained_model(tmp_path)
        assert again.answer(pictures, [question] * len(pictures), **new) == expected

    def test_explain_draws_the_maps_of_pixels_and_says_why_not_the_others(
        self, llava_next, pictures
    ):
        ours = load_pretrained_model(llava_next)
        found = ours.explain(pictures[0], "What?", max_new_tokens=2, ablation=True, gradient=True)
        assert found.answer == ours.answer(pictures[0], "What?", max_new_tokens=2)[0]
        assert len(found.frames) == 4  # 100 x 300: an overview and 1 x 3 tiles
        assert found.ablation.shape[1] == 4
        assert "merges the tiles" in found.no_grid
        overview, *tiles = found.frames
        assert overview.visible == pytest.approx((0, 0, 300, 100), abs=1)
        assert [tile.left for tile in tiles] == pytest.approx([0, 100, 200], abs=2)

    def test_a_mistral_is_read_as_it_is(self, tmp_path, pictures):
        folder = write_llava_next(tmp_path / "mistral", text={"model_type": "mistral"})
        theirs = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
        ours = load_pretrained_model(folder, moe_config=False)
        batch, own_batch = self.batches(folder, ours, pictures)
        found, expected = logits_of(ours.model, own_batch), logits_of(theirs, batch)
        is_token = batch["attention_mask"].bool()
        torch.testing.assert_close(found[is_token], expected[is_token], rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="has a Mistral"):
            load_pretrained_model(folder)

    def test_what_does_not_fit_together_is_refused(self, llava_next, tmp_path, pictures):
        ours = load_pretrained_model(llava_next, moe_config=False)
        inputs = ours.processor(text=PROMPTS[0], images=pictures[0], return_tensors="pt")
        sizes = inputs.pop("image_sizes")
        with pytest.raises(ValueError, match="needs image_sizes"):
            ours.model(**inputs)
        with pytest.raises(ValueError, match="2 images make 8 views, but 4 views are given"):
            ours.model(**inputs, image_sizes=sizes.repeat(2, 1))
        change = {"image_grid_pinpoints": [[56, 112]]}
        with pytest.raises(ValueError, match=r"\[\[56, 112\]\] in the config, but \[\[56, 112\], "):
            load_pretrained_model(
                edited(llava_next, tmp_path, lambda config: config.update(change))
            )

    def test_tiles_that_the_tower_does_not_see_are_refused(self, tmp_path):
        folder = write_llava_next(tmp_path / "odd", image_grid_pinpoints=[[56, 100]])
        with pytest.raises(ValueError, match=r"\[\[56, 100\]\], but its tower sees 56x56 pixels"):
            load_pretrained_model(folder)


def edited(llava, tmp_path, change):
    folder = tmp_path / "edited"
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestBadInput:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("projector_hidden_act", "relu", r"projector_hidden_act='relu', but only 'gelu'"),
            ("multimodal_projector_bias", False, r"multimodal_projector_bias=False, but only True"),
            (
                "image_token_index",
                31999,
                r"image_token_index=31999, but the tokenizer has <image> at 32000",
            ),
            (
                "text_config",
                {"model_type": "qwen2"},
                r"text_config\.model_type='qwen2', but only 'llama'",
            ),
            (
                "vision_config",
                {"model_type": "siglip_vision_model"},
                r"'siglip_vision_model', but only 'clip_vision",
            ),
        ],
    )
    def test_another_kind_of_llava_is_refused_by_name(self, llava, tmp_path, key, value, message):
        with pytest.raises(ValueError, match=message):
            load_pretrained_model(
                edited(llava, tmp_path, lambda config: config.update({key: value}))
            )

    def test_a_missing_tensor_is_named(self, llava, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = edited(llava, tmp_path, lambda config: None)
        state = load_file(folder / "model.safetensors")
        del state["multi_modal_projector.linear_2.bias"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"missing keys: model\.multi_modal_projector\.linear_2\.bias"
        ):
            load_pretrained_model(folder)

    def test_a_missing_shard_is_named(self, llava, tmp_path):
        folder = edited(llava, tmp_path, lambda config: None)
        LlavaForConditionalGeneration.from_pretrained(llava).save_pretrained(
            folder, max_shard_size="5MB"
        )
        (folder / "model.safetensors").unlink(missing_ok=True)
        shard = sorted(folder.glob("model-00002-of-*.safetensors"))[0]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            load_pretrained_model(folder)

    def test_a_checkpoint_without_processor_says_so(self, llava, tmp_path):
        folder = edited(llava, tmp_path, lambda config: None)
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name != "config.json":
                path.unlink()
        with pytest.raises(OSError, match="has no processor that can be read"):
            load_pretrained_model(folder)

    def test_a_tower_cannot_be_swapped_in(self, llava):
        with pytest.raises(ValueError, match="parts are fixed"):
            load_pretrained_model(llava, encoder_type="biomedclip")


def test_moe_llavas_projector_for_images_is_read(tmp_path):
    weights = {"0.weight": torch.randn(64, 32), "0.bias": torch.randn(64)}
    named = {f"model.mm_projector.image_spatial_proj.{k}": v for k, v in weights.items()}
    named["model.mm_projector.video_patch_proj.0.weight"] = torch.randn(64, 32)
    torch.save(named, tmp_path / "mm_projector.bin")
    found = read_mm_projector(tmp_path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())

"""The joined model in other people's hands: pipelines, PEFT, accelerate, compilation,
checkpointing, caches.
"""

import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(loaded, images):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}],
        }
    ]
    options = {
        "tokenize": True,
        "add_generation_prompt": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    return loaded.processor.apply_chat_template(chat, **options)


def greedy(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=6, max_length=None, do_sample=False, **options)


def test_the_image_text_to_text_pipeline_answers(loaded, saved, images):
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=str(saved), device="cpu")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Why?"}],
        }
    ]
    (output,) = pipe(text=chat, max_new_tokens=6, return_full_text=False)
    assert output["generated_text"].strip() == loaded.answer(images[0], "Why?", max_new_tokens=6)[0]


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 3}, {"num_return_sequences": 1}]
)
def test_generation_options_work_with_images(loaded, inputs, options):
    output = greedy(loaded.model, inputs, **options)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    if "num_beams" not in options:
        assert torch.equal(output, greedy(loaded.model, inputs))


def test_generation_from_embeddings_returns_the_new_tokens(loaded, inputs):
    embeds = loaded.model.get_input_embeddings()(inputs["input_ids"])
    new = greedy(
        loaded.model,
        {
            "inputs_embeds": embeds,
            "pixel_values": inputs["pixel_values"],
            "attention_mask": inputs["attention_mask"],
        },
    )
    assert torch.equal(new, greedy(loaded.model, inputs)[:, inputs["input_ids"].shape[1] :])


def test_activation_checkpointing_leaves_the_gradients(parts, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = load_pretrained_model(parts, dtype="float32").model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_resized_embeddings_keep_the_logits_of_known_tokens(parts, inputs):
    model = load_pretrained_model(parts, dtype="float32").model
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(32064)
        after = model(**inputs).logits
    assert model.config.text_config.vocab_size == after.shape[-1] == 32064
    torch.testing.assert_close(after[..., :32001], before)


def test_a_compiled_forward_gives_the_same_logits(loaded, inputs):
    compiled = torch.compile(loaded.model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs).logits, loaded.model(**inputs).logits, rtol=0, atol=1e-4
        )


def test_a_language_model_on_disk_gives_the_same_logits(loaded, saved, inputs):
    on_cpu = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    spread = load_pretrained_model(
        saved, device_map=on_cpu | {"model.language_model": "disk"}
    ).model
    assert spread.model.language_model.layers[0].mlp.experts.gate_up_proj.device.type == "meta"
    with torch.no_grad():
        expected = loaded.model(**inputs).logits
        torch.testing.assert_close(spread(**inputs).logits, expected, rtol=1e-6, atol=1e-6)


class TestPeft:
    @pytest.fixture
    def adapted(self, parts):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj)",
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        return peft.get_peft_model(load_pretrained_model(parts, dtype="float32").model, config)

    def test_adapters_start_as_nothing_and_learn(self, adapted, loaded, inputs):
        with torch.no_grad():
            torch.testing.assert_close(
                adapted(**inputs).logits, loaded.model(**inputs).logits, rtol=0, atol=1e-5
            )
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        reached = {
            name
            for name, weight in adapted.named_parameters()
            if weight.grad is not None and weight.grad.any()
        }
        assert any("experts" in name for name in reached)
        assert any("q_proj" in name for name in reached)

    def test_merged_and_reloaded_adapters_agree(self, adapted, parts, inputs, tmp_path):
        import peft

        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
            expected = adapted(**inputs).logits
            adapted.save_pretrained(tmp_path)
            base = load_pretrained_model(parts, dtype="float32").model
            reloaded = peft.PeftModel.from_pretrained(base, tmp_path)
            torch.testing.assert_close(reloaded(**inputs).logits, expected, rtol=0, atol=1e-4)
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-4)

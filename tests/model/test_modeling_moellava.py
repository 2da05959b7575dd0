import pytest
import torch

from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.modeling_moellava import place_image_embeds

IMAGE = 32000


def prompt(num_image_tokens: list[int], text: int = 5) -> list[int]:
    """Ids: the runs of placeholders, one text token behind each, and some text."""
    ids = [1]
    for count in num_image_tokens:
        ids += [IMAGE] * count + [300]
    return ids + [301] * text


@pytest.fixture(scope="module")
def pixels(loaded, images):
    return loaded.image_processor(images, return_tensors="pt")["pixel_values"]


def logits(loaded, rows, pixels):
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor(rows), pixel_values=pixels).logits


class TestPlaceholders:
    def test_one_token_too_few_names_both_counts_and_the_image(self, loaded, pixels):
        with pytest.raises(
            ValueError, match=r"do not match: 195 tokens, 196 features in image 2 of the batch"
        ):
            logits(loaded, [prompt([196, 195])], pixels[:2])

    def test_runs_that_cancel_out_are_refused(self, loaded, pixels):
        rows = [prompt([200]), prompt([192], text=13)]
        with pytest.raises(
            ValueError, match=r"do not match: 200 tokens, 196 features in image 1 of the batch"
        ):
            logits(loaded, rows, pixels[:2])

    def test_an_adjacent_pair_with_a_missing_token_blames_the_second(self, loaded, pixels):
        with pytest.raises(
            ValueError, match=r"do not match: 195 tokens, 196 features in image 2 of the batch"
        ):
            logits(loaded, [prompt([391])], pixels[:2])

    def test_an_image_without_placeholder_gives_both_totals(self, loaded, pixels):
        with pytest.raises(
            ValueError, match=r"do not match: 196 tokens in the prompts, 392 features of 2 images"
        ):
            logits(loaded, [prompt([196])], pixels[:2])

    def test_a_placeholder_without_image_gives_both_totals(self, loaded, pixels):
        with pytest.raises(
            ValueError, match=r"do not match: 392 tokens in the prompts, 196 features of 1 images"
        ):
            logits(loaded, [prompt([196, 196])], pixels[:1])

    def test_the_old_placeholder_id_points_to_the_processor(self, loaded, pixels):
        with pytest.raises(ValueError, match=r"input_ids hold -200.*MoeLlavaProcessor"):
            logits(loaded, [[1, -200, 300]], pixels[:1])

    def test_two_images_side_by_side_pass(self, loaded, pixels):
        assert logits(loaded, [prompt([392])], pixels[:2]).shape[1] == len(prompt([392]))

    def test_images_go_to_their_rows_in_order(self, loaded, pixels):
        together = logits(loaded, [prompt([196]), prompt([196])], pixels[:2])
        for row in range(2):
            alone = logits(loaded, [prompt([196])], pixels[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
        assert (together[0, -1] - together[1, -1]).abs().max() > 1e-4


def test_place_image_embeds_fills_placeholders_in_order():
    embeds, is_image = torch.zeros(2, 4, 1), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    images = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    assert place_image_embeds(embeds, images, is_image)[..., 0].tolist() == [
        [0, 1, 2, 0],
        [3, 4, 0, 0],
    ]


def test_embeddings_in_place_of_ids_give_the_same_logits(loaded, pixels):
    ids = torch.tensor([prompt([196])])
    with torch.no_grad():
        embeds = loaded.model.get_input_embeddings()(ids)
        from_embeds = loaded.model(inputs_embeds=embeds, pixel_values=pixels[:1]).logits
        assert torch.equal(from_embeds, loaded.model(input_ids=ids, pixel_values=pixels[:1]).logits)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            loaded.model(input_ids=ids, inputs_embeds=embeds)


def test_generate_encodes_the_images_once(loaded, images, monkeypatch):
    calls = []
    tower = loaded.model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    loaded.answer(images[0], "What is this?", max_new_tokens=4)
    loaded.answer(images[0], "What is this?", max_new_tokens=4, num_beams=2)
    assert len(calls) == 2


def test_generation_with_and_without_cache_agrees(loaded, images):
    answers = [
        loaded.answer(images[:2], ["What is this?", "Why?"], max_new_tokens=8, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert answers[0] == answers[1]


class TestLoss:
    @pytest.fixture
    def batch(self, pixels):
        ids = torch.tensor([prompt([196])])
        labels = ids.masked_fill(ids == IMAGE, -100)
        return {
            "input_ids": ids,
            "pixel_values": pixels[:1],
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
        }

    def test_evaluation_loss_is_cross_entropy_alone(self, loaded, batch):
        with torch.no_grad():
            output = loaded.model(**batch)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], batch["labels"][0, 1:])
        torch.testing.assert_close(output.loss, expected)
        assert output.aux_loss is None
        assert output.router_logits is None

    def test_training_adds_the_routers_share(self, parts, batch):
        model = load_pretrained_model(
            parts, dtype="float32", moe_config={"router_aux_loss_coef": 0.5}
        ).model
        with torch.no_grad():
            plain = model(**batch).loss
            model.train()
            output = model(**batch)
        torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss)

    def test_router_logits_are_recorded_on_request(self, loaded, batch):
        with torch.no_grad():
            output = loaded.model(**batch, output_router_logits=True)
        assert [tuple(layer.shape) for layer in output.router_logits] == [
            (batch["input_ids"].numel(), 4)
        ] * 2
        assert 0.9 < output.aux_loss < 4

    def test_gradients_reach_tower_projector_experts_and_router(self, parts, batch):
        model = load_pretrained_model(parts, dtype="float32").model.train()
        model(**batch).loss.backward()
        names = [
            name
            for name, weight in model.named_parameters()
            if weight.grad is not None and weight.grad.any()
        ]
        for part in (
            "vision_tower",
            "multi_modal_projector",
            "experts.gate_up_proj",
            "mlp.gate.weight",
            "lm_head",
        ):
            assert any(part in name for name in names), part


def test_a_dense_language_model_has_no_router(parts, images):
    loaded = load_pretrained_model(parts, moe_config=False, dtype="float32")
    assert loaded.model.config.text_config.model_type == "llama"
    pixels = loaded.image_processor(images[:1], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([prompt([196])])
    with torch.no_grad():
        output = loaded.model(input_ids=ids, pixel_values=pixels, output_router_logits=True)
    assert output.logits.shape == (1, ids.shape[1], 32001)
    assert output.router_logits is None
    assert output.aux_loss is None


def test_the_projector_is_given_contiguous_patch_tokens(loaded, pixels):
    given = []
    projector = loaded.model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        loaded.model.get_image_features(pixels)
    hook.remove()
    assert [tokens.is_contiguous() for tokens in given] == [True]

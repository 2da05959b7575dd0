"""Large images as several views: grids, tiles, placeholders, and the same answer in any company."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from moellava.data.chat_labels import num_chat_tokens, tokenize_chat
from moellava.data.collate import ChatCollator
from moellava.data.rows import Turn
from moellava.eval.asking import Asked, Asker
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.model.describe import describe
from moellava.model.prompts import write_prompt
from moellava.model.tiling import RULES, Tiling, cut_tiles, tile_boxes
from moellava.model.turns import Turn as ChatTurn
from moellava.model.turns import read_picture

TILE = (224, 224)
QUESTION = "Is the heart enlarged?"


@pytest.fixture(scope="module")
def tiled(parts):
    description = {**parts, "projector_type": "pixel_shuffle", "tiling": {"max_tiles": 6}}
    return load_pretrained_model(description, dtype="float32")


@pytest.fixture(scope="module")
def wide() -> Image.Image:
    """Twice as wide as high, so that 2 x 3 tiles are not its grid by any rule."""
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (600, 1200, 3), dtype=np.uint8)
    )


def internvl_grid(width: int, height: int, most: int) -> tuple[int, int]:
    """As InternVL's `dynamic_preprocess` writes it: (rows, columns)."""
    ratios = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most}
    best, best_difference = (1, 1), float("inf")
    for i, j in sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]):
        difference = abs(width / height - i / j)
        if difference < best_difference:
            best, best_difference = (i, j), difference
        elif difference == best_difference and width * height > 0.5 * 224 * 224 * i * j:
            best = (i, j)
    return best[1], best[0]


def llava_next_grid(width: int, height: int, most: int) -> tuple[int, int]:
    """The rule in words: most pixels of the image kept, then least waste."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * 224 / width, rows * 224 / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns * 224 * 224

    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    return max(grids, key=merit)


SIZES = [
    (100, 100), (224, 224), (225, 224), (448, 448), (640, 480), (480, 640), (2500, 2048),
    (3000, 3000), (1200, 600), (600, 1200), (2000, 500), (500, 2000), (900, 500), (1344, 224),
]  # fmt: skip


@pytest.mark.parametrize("most", [2, 4, 6, 9])
@pytest.mark.parametrize("size", SIZES)
def test_grids_are_those_of_the_published_rules(size, most):
    width, height = size
    ours = {
        rule: Tiling(max_tiles=most, rule=rule).choose_grid(width, height, TILE) for rule in RULES
    }
    assert ours["internvl"] == internvl_grid(width, height, most)
    assert ours["llava_next"] == llava_next_grid(width, height, most)
    assert all(rows * columns <= most for rows, columns in ours.values())


def test_an_image_that_a_tile_holds_and_one_that_is_a_line_stay_one_view():
    assert Tiling().choose_grid(224, 200, TILE) == (1, 1)
    assert Tiling().choose_grid(10_000, 1, TILE) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tiles": 1}, "max_tiles of tiling is 1; give 2 or more"),
        ({"max_tiles": 65}, "MOELLAVA_MAX_TILES"),
        ({"rule": "anyres"}, "Unknown rule of tiling 'anyres'"),
        ({"max_tile": 4}, "Did you mean 'tiling.max_tiles'"),
        ({"max_tiles": "many"}, "expected a whole number"),
    ],
)
def test_a_tiling_that_cannot_be_is_refused(parts, settings, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model({**parts, "tiling": settings})


def test_tiles_are_the_image_cut_row_by_row():
    """448 x 224 at its own size is two tiles without a change."""
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (224, 448, 3), dtype=np.uint8)
    )
    left, right = (np.asarray(tile) for tile in cut_tiles(picture, (1, 2), TILE))
    assert np.array_equal(np.hstack([left, right]), np.asarray(picture))


@pytest.mark.parametrize("size", [(1200, 600), (500, 900), (777, 1111)])
def test_boxes_say_where_a_tile_lies(size):
    """A white spot of the image is seen in the tile that the box says, at the place it says."""
    width, height = size
    grid = Tiling().choose_grid(width, height, TILE)
    x, y = round(0.8 * width), round(0.3 * height)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[y - 8 : y + 8, x - 8 : x + 8] = 255
    boxes = tile_boxes(size, grid, TILE)
    for box, tile in zip(boxes, cut_tiles(Image.fromarray(pixels), grid, TILE), strict=True):
        left, upper, right, lower = box
        seen = np.asarray(tile)[..., 0].astype(float)
        inside = left + 10 < x < right - 10 and upper + 10 < y < lower - 10
        assert (seen.sum() > 1000) == inside
        if inside:
            rows, columns = np.indices(seen.shape)
            found_x = (seen * columns).sum() / seen.sum() / 224 * (right - left) + left
            found_y = (seen * rows).sum() / seen.sum() / 224 * (lower - upper) + upper
            assert math.dist((found_x, found_y), (x, y)) < 3


def test_six_tiles_and_an_overview_are_343_tokens_and_line_breaks(tiled, wide):
    processor = tiled.processor
    square = processor.layout((3000, 2000))
    assert square.text == "<image>\n<image><image><image>\n<image><image><image>"
    ids = processor.layout_ids(square)
    assert ids.count(processor.image_token_id) == 7 * 49
    counts = processor._get_num_multimodal_tokens(image_sizes=[(2000, 3000), (50, 50)])
    assert counts["num_image_tokens"] == [343, 49]
    assert counts["num_image_patches"] == [7, 1]
    inputs = processor(text="<image>\nWhy?", images=wide, return_tensors="pt")
    grid = processor.grid(wide.size)
    assert inputs["pixel_values"].shape == (1 + grid[0] * grid[1], 3, 224, 224)


def test_a_tiles_tokens_are_those_of_the_same_crop_given_alone(tiled, wide):
    seen = tiled.processor.pixel_values([wide])
    grid = tiled.processor.grid(wide.size)
    crops = cut_tiles(wide, grid, TILE)
    plain = tiled.image_processor
    assert torch.equal(seen[0], plain([wide], return_tensors="pt")["pixel_values"][0])
    for view, crop in zip(seen[1:], crops, strict=True):
        assert torch.equal(view, plain([crop], return_tensors="pt")["pixel_values"][0])


def test_a_batch_answers_as_one_by_one_and_every_way_of_asking_agrees(tiled, wide):
    """A tiled image, one that stays one view, and a text; streamed and evaluated, too."""
    small = Image.new("RGB", (150, 120), (200, 0, 0))
    given = [wide, small, None]
    together = tiled.answer(given, [QUESTION] * 3, max_new_tokens=4)
    alone = [tiled.answer(image, QUESTION, max_new_tokens=4)[0] for image in given]
    assert together == alone
    assert together[0] != tiled.answer(wide.resize((200, 100)), QUESTION, max_new_tokens=4)[0]
    content = [{"type": "image", "image": wide}, {"type": "text", "text": QUESTION}]
    streamed = tiled.stream([{"role": "user", "content": content}], max_new_tokens=4)
    assert "".join(streamed) == together[0]
    asker = Asker(tiled, {"wide": wide, "small": small}.__getitem__, max_new_tokens=4)
    asked = [
        Asked(id=name, turns=(Turn("user", f"<image>\n{QUESTION}"),), images=(name,))
        for name in ("wide", "small")
    ]
    evaluated = {answer.id: answer.text for batch in asker.ask(asked) for answer in batch}
    assert evaluated == {"wide": together[0], "small": together[1]}


def test_training_sees_the_prompt_that_is_asked(tiled, wide):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": wide}, {"type": "text", "text": QUESTION}],
        },
        {"role": "assistant", "content": "no"},
    ]
    processor = tiled.processor
    batch = ChatCollator(processor)([{"id": "a", "messages": messages}])
    text = processor.apply_chat_template(messages, tokenize=False)
    asked = processor(text=text, images=wide, return_tensors="pt")
    assert torch.equal(batch["input_ids"], asked["input_ids"])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    is_image = batch["input_ids"] == processor.image_token_id
    assert (batch["labels"][is_image] == -100).all()
    lengths = num_chat_tokens([messages], processor, str(processor.chat_template))
    assert lengths == [batch["input_ids"].shape[1]]
    with torch.inference_mode():
        assert torch.isfinite(tiled.model(**batch).loss)
    packed = ChatCollator(processor, packing=True)([{"id": "a", "messages": messages}] * 2)
    assert packed["input_ids"].tolist() == [batch["input_ids"][0].tolist() * 2]
    assert torch.equal(packed["pixel_values"], batch["pixel_values"].repeat(2, 1, 1, 1))
    with torch.inference_mode():
        assert torch.allclose(tiled.model(**packed).loss, tiled.model(**batch).loss, atol=1e-5)
    typed = [{"type": "image"}, {"type": "text", "text": "<image>"}]
    both, template = [{"role": "user", "content": typed}], str(processor.chat_template)
    with pytest.raises(ValueError, match="the text holds 2 <image>"):
        tokenize_chat(both, processor, template)


def test_a_conversation_takes_the_picture_with_its_line_breaks_as_one(tiled, wide):
    turn_picture = read_picture(tiled.processor, wide)
    assert turn_picture.layout.num_tokens == 49 * len(turn_picture.inputs["pixel_values"])
    prompt = write_prompt(tiled.processor, [ChatTurn("user", (turn_picture, QUESTION))])
    places = [place for place, key in enumerate(prompt.keys) if key is turn_picture]
    assert places == list(range(places[0], places[-1] + 1))
    assert prompt.ids[places[0]] == prompt.ids[places[-1]] == tiled.processor.image_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_line_breaks_between_rows_of_tiles(tiled, wide, side):
    processor = tiled.processor
    layout = processor.layout_ids(processor.layout(wide.size))
    processor.tokenizer.truncation_side = side
    try:
        ids = processor(
            text="one two three <image> four five six", images=wide, truncation=True,
            max_length=len(layout) + 2,
        )["input_ids"][0]  # fmt: skip
    finally:
        processor.tokenizer.truncation_side = "right"
    start = ids.index(processor.image_token_id)
    assert ids[start : start + len(layout)] == layout
    assert len(ids) == len(layout) + 2


def test_it_is_saved_and_opens_again(tiled, wide, tmp_path):
    tiled.model.save_pretrained(tmp_path)
    tiled.processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path)
    assert again.processor.tiling == again.model.config.tiling == tiled.processor.tiling
    one, other = (loaded.answer(wide, QUESTION, max_new_tokens=4) for loaded in (tiled, again))
    assert one == other
    assert "tiles" in describe(again.model)
    again.processor.set_tiling(None)
    assert len(again.processor.pixel_values([wide])) == 1


def test_more_tiles_than_the_context_holds_are_refused_with_the_numbers(parts, tiled, wide):
    message = "up to 13 views of an image, 196 tokens each: 2548 tokens, but the context holds 2048"
    with pytest.raises(ValueError, match=message):
        load_pretrained_model({**parts, "tiling": {"max_tiles": 12}})
    count = rf"{49 * tiled.processor.layout(wide.size).num_views * 8} of images"
    with pytest.raises(ValueError, match=rf"{count}.*pass fewer images or tiles"):
        tiled.answer([wide] * 8, QUESTION)


def test_a_grey_image_has_the_views_of_its_rgb(tiled, wide):
    grey = wide.convert("L")
    one, other = (tiled.processor.pixel_values([image]) for image in (grey, grey.convert("RGB")))
    assert torch.equal(one, other)


def test_grids_may_be_chosen(tiled):
    tiling = Tiling(max_tiles=4, grids=((1, 2), (2, 2)))
    assert tiling.choose_grid(1200, 600, TILE) == (1, 2)
    assert tiling.choose_grid(50, 50, TILE) == (1, 2)  # even if a tile holds the image
    assert tiling.num_views((1, 2)) == 3
    with pytest.raises(ValueError, match=r"grids of tiling are \[\[3, 2\]\]; expected rows and"):
        Tiling(max_tiles=4, grids=((3, 2),))
    with pytest.raises(ValueError, match="need the rule llava_next"):
        Tiling(max_tiles=4, grids=((1, 2),), rule="internvl")


def test_without_tiling_nothing_changes(loaded, wide):
    inputs = loaded.processor(text="<image>", images=wide, return_tensors="pt")
    plain = loaded.image_processor([wide], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], plain)
    assert loaded.processor.layout(wide.size).text == "<image>"
    assert loaded.processor.grid(wide.size) == (1, 1)


def test_explain_shows_each_view_at_its_place(tiled, wide):
    explanation = tiled.explain(wide, QUESTION, max_new_tokens=2)
    rows, columns = tiled.processor.grid(wide.size)
    assert len(explanation.frames) == len(explanation.pictures) == 1 + rows * columns
    assert explanation.map(image=rows * columns).shape == (7, 7)
    first, last = explanation.frames[1], explanation.frames[-1]
    assert (first.left, first.top) == tile_boxes(wide.size, (rows, columns), TILE)[0][:2]
    assert (last.right, last.bottom) == tile_boxes(wide.size, (rows, columns), TILE)[-1][2:]


def test_tiles_are_drawn_as_one_map_over_the_picture(tiled, wide, tmp_path):
    small = Image.new("RGB", (100, 80))
    explanation = tiled.explain([small, wide], QUESTION, max_new_tokens=2, gradient=True)
    rows, columns = tiled.processor.grid(wide.size)
    values, frame = explanation.stitched(picture=1)
    assert values.shape == (7 * rows, 7 * columns)
    placed = frame.place(values)
    assert placed.shape == wide.size[::-1]
    for tile in range(rows * columns):  # the view number 2 is the first: small, overview, tiles
        alone = explanation.on_picture(explanation.map(image=2 + tile), 2 + tile)
        is_tile = ~np.isnan(alone)
        assert is_tile.any()
        np.testing.assert_array_equal(placed[is_tile], alone[is_tile])
    assert explanation.stitched("gradient", picture=1)[0].shape == (7 * rows, 7 * columns)
    explanation.draw_overlay(tmp_path / "tiles.png", image=1, stitched=True)
    assert Image.open(tmp_path / "tiles.png").size[0] > 500
    with pytest.raises(ValueError, match="Picture 0 has one view, and no tiles"):
        explanation.stitched(picture=0)


class TestJoint:
    """A resampler that sees the patches of all views."""

    @pytest.fixture(scope="class")
    def joint(self, parts):
        description = {
            **parts,
            "projector_type": "perceiver",
            "projector_options": {"num_latents": 8, "num_layers": 1},
            "tiling": {"max_tiles": 4, "merge": "joint"},
        }
        return load_pretrained_model(description, dtype="float32")

    def test_an_image_has_as_many_tokens_as_one_view(self, joint, wide):
        small = Image.new("RGB", (50, 60))
        inputs = joint.processor(
            text=["<image>", "<image>"], images=[[wide], [small]], padding=True, return_tensors="pt"
        )
        is_image = inputs["input_ids"] == joint.processor.image_token_id
        assert is_image.sum(1).tolist() == [8, 8]
        assert len(inputs["pixel_values"]) == joint.processor.layout(wide.size).num_views + 1 > 3
        own = joint.model.get_image_features(
            inputs["pixel_values"][:-1], inputs["image_sizes"][:1], return_dict=True
        )
        model = joint.model.model
        with torch.inference_mode():
            patches = model.vision_tower(inputs["pixel_values"][:-1]).patch_tokens
            expected = model.multi_modal_projector(patches.flatten(0, 1)[None])[0]
        torch.testing.assert_close(own.pooler_output[0], expected)

    def test_every_way_of_asking_agrees_and_sees_the_tiles(self, joint, wide, tmp_path):
        new = {"max_new_tokens": 4}
        small = Image.new("RGB", (50, 60))
        expected = [joint.answer(image, QUESTION, **new)[0] for image in (wide, small)]
        assert joint.answer([wide, small], [QUESTION] * 2, **new) == expected
        assert joint.explain(wide, QUESTION, **new).answer == expected[0]
        joint.model.save_pretrained(tmp_path)
        joint.processor.save_pretrained(tmp_path)
        again = load_pretrained_model(tmp_path)
        assert again.answer([wide, small], [QUESTION] * 2, **new) == expected
        inputs = joint.processor(text=f"<image>{QUESTION}", images=wide, return_tensors="pt")
        seen, blind = inputs["pixel_values"], inputs["pixel_values"].clone()
        blind[-1] = 0  # the last tile
        with torch.inference_mode():
            one, other = (
                joint.model(**{**inputs, "pixel_values": pixels}).logits for pixels in (seen, blind)
            )
        assert (one - other).abs().max() > 1e-5

    @pytest.mark.parametrize(
        ("projector", "merge", "message"),
        [
            ("mlp2x_gelu", "joint", "makes 196 tokens of 196 patches and 392 of 392"),
            ("perceiver", "spatial_unpad", "comes with a checkpoint of LLaVA-NeXT"),
            ("perceiver", "flta", "Did you mean 'flat'"),
        ],
    )
    def test_a_projector_that_cannot_merge_is_refused(self, parts, projector, merge, message):
        tiling = {"max_tiles": 4, "merge": merge}
        with pytest.raises(ValueError, match=message):
            load_pretrained_model({**parts, "projector_type": projector, "tiling": tiling})

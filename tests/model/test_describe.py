import pytest

from moellava import describe, load_pretrained_model
from moellava.model.describe import count_active_parameters


def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_are_chosen(loaded, parts):
    chosen = load_pretrained_model(
        parts, moe_config={"num_experts": 2, "num_experts_per_tok": 2}
    ).model
    config = loaded.model.config.text_config
    routers = (config.num_experts - 2) * config.hidden_size * len(config.moe_layer_indices)
    assert count_active_parameters(loaded.model) == chosen.num_parameters() + routers


def test_a_dense_model_is_active_as_a_whole(parts):
    model = load_pretrained_model(parts, moe_config=False).model
    assert count_active_parameters(model) == model.num_parameters()


def test_the_table_names_parts_shapes_counts_and_memory(loaded):
    lines = describe(loaded.model).splitlines()
    cells = {line.split()[0]: line for line in lines}
    assert "(N=196, D=192)" in cells["vision_tower"]
    assert f"{loaded.model.num_parameters():,}" in cells["all"]
    assert "mixtures of 4 experts, top-2, in layers [0, 2]" in lines[-1]
    mebibytes = [float(lines[row].split()[-1].replace(",", "")) for row in range(1, 6)]
    assert sum(mebibytes[:4]) == pytest.approx(mebibytes[4], abs=0.3)
    assert mebibytes[4] == pytest.approx(loaded.model.num_parameters() * 4 / 2**20, abs=0.1)

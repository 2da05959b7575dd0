"""What a file may ask for before memory is spent."""

import pytest

from moellava.storage.limits import LIMITS, limit, require_bounded, require_within


def test_a_number_beyond_its_limit_names_place_number_limit_and_the_way_out():
    require_within("layers", LIMITS["layers"], "a config")
    message = (
        r"a config asks for 10,000,000 \(layers\).*limit is 1,024.*MOELLAVA_MAX_LAYERS=10000000"
    )
    with pytest.raises(ValueError, match=message):
        require_within("layers", 10**7, "a config")


def test_the_environment_raises_a_limit(monkeypatch):
    monkeypatch.setenv("MOELLAVA_MAX_LAYERS", "5000")
    require_within("layers", 5000, "a config")
    with pytest.raises(ValueError, match="limit is 5,000"):
        require_within("layers", 5001, "a config")
    monkeypatch.setenv("MOELLAVA_MAX_LAYERS", "many")
    with pytest.raises(ValueError, match="MOELLAVA_MAX_LAYERS is 'many'; expected a whole number"):
        limit("layers")


def test_an_unknown_limit_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'layers'"):
        limit("layer")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers in x"),
        ({"text_config": {"num_experts": 10**9}}, r"text_config\.num_experts in x"),
        ({"a": {"b": {"vocab_size": 10**12}}}, r"a\.b\.vocab_size in x"),
        ({"moe": {"num_experts": [4, 10**9]}}, r"moe\.num_experts in x"),
    ],
)
def test_sizes_of_nested_configs_are_bounded(config, message):
    require_bounded(
        "x", {"num_hidden_layers": 126, "hidden_size": 16384, "a": {"num_experts": 256}}
    )
    with pytest.raises(ValueError, match=message):
        require_bounded("x", config)


def test_a_config_nested_without_end_is_refused():
    config: dict[str, object] = {}
    for _ in range(500):
        config = {"text_config": config}
    with pytest.raises(ValueError, match=r"\(nesting\), but the limit is 32"):
        require_bounded("x", config)

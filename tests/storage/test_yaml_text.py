"""YAML that would grow, or that says a thing twice."""

import pytest
import yaml

from moellava.storage.yaml_text import load_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_aliases_that_unfold_a_billionfold_are_refused():
    with pytest.raises(ValueError, match=r"aliases asks for .* \(values\).*MOELLAVA_MAX_VALUES"):
        load_yaml(LAUGHS)


def test_a_value_inside_itself_is_refused():
    with pytest.raises(ValueError, match=r"\(values\)"):
        load_yaml("a: &a [1, *a]")


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 5000 + "a", "{a: " * 5000])
def test_nesting_without_end_is_an_error(text):
    with pytest.raises((ValueError, yaml.YAMLError)):
        load_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", "1e-4", "[1, two, 3.0]", "", '{"json": [true]}'],
)
def test_other_yaml_means_what_pyyaml_says(text):
    assert load_yaml(text) == yaml.safe_load(text)

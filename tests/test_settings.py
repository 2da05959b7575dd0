"""A mapping becomes a checked dataclass; errors name the key, what was found and expected."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from moellava.settings import convert, from_mapping, known_keys


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 1e-3
    steps: int | None = None
    kind: Literal["adam", "sgd"] = "adam"
    batch: Annotated[int, Field(gt=0)] = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str
    parts: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)
    extra: Optimizer | None = None
    path: str | Path | None = None
    resumes: bool = False
    frame: int | str | None = None
    size: int | Literal["small", "large"] = 1
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "refused":
            raise ValueError("name is 'refused'. Choose another.")


def read(**settings: object) -> Settings:
    return from_mapping(Settings, {"name": "n", **settings}, kind="setting")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": {"rate": "1e-4"}}, Settings(name="n", optimizer=Optimizer(rate=1e-4))),
        ({"optimizer": {"rate": 1}}, Settings(name="n", optimizer=Optimizer(rate=1.0))),
        ({"optimizer": {"steps": "12"}}, Settings(name="n", optimizer=Optimizer(steps=12))),
        ({"optimizer": {"steps": None}}, Settings(name="n")),
        ({"optimizer": {"kind": "sgd"}}, Settings(name="n", optimizer=Optimizer(kind="sgd"))),
        ({"parts": ["a", "b"]}, Settings(name="n", parts=("a", "b"))),
        ({"parts": "a"}, Settings(name="n", parts=("a",))),
        ({"extra": None}, Settings(name="n")),
        ({"extra": {"steps": 1}}, Settings(name="n", extra=Optimizer(steps=1))),
        ({"optimizer": Optimizer(steps=2)}, Settings(name="n", optimizer=Optimizer(steps=2))),
        ({"path": Path("a")}, Settings(name="n", path=Path("a"))),
        ({"frame": "grid"}, Settings(name="n", frame="grid")),
        ({"frame": 3}, Settings(name="n", frame=3)),
        ({"size": "large"}, Settings(name="n", size="large")),
        ({"options": {"a": True, "b": [1]}}, Settings(name="n", options={"a": True, "b": [1]})),
        ({"resumes": True}, Settings(name="n", resumes=True)),
    ],
)
def test_values_become_the_types_that_the_fields_declare(given, expected):
    found = read(**given)
    assert found == expected
    assert type(found.optimizer.rate) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"optimizer": {"steps": "many"}},
            r"^optimizer.steps is 'many'; expected a whole number.$",
        ),
        ({"optimizer": {"steps": 1.5}}, r"^optimizer.steps is 1.5; expected a whole number.$"),
        ({"optimizer": {"rate": "fast"}}, r"^optimizer.rate is 'fast'; expected a number.$"),
        ({"extra": {"rate": []}}, r"^extra.rate is \[\]; expected a number.$"),
        ({"optimizer": {"batch": -1}}, r"^optimizer.batch is -1; expected more than 0.$"),
        ({"resumes": 3}, r"^resumes is 3; expected true or false.$"),
        ({"name": 3}, r"^name is 3; expected text.$"),
        ({"parts": 3}, r"^parts is 3; expected a list.$"),
        ({"parts": ["a", 3]}, r"^parts is 3; expected text.$"),
        ({"path": 3}, r"^path is 3; expected text or .*path"),
        ({"frame": 1.5}, r"^frame is 1.5; expected a whole number or text.$"),
        ({"options": 3}, r"^options is 3; expected a mapping.$"),
        ({"name": "refused"}, r"^name is 'refused'. Choose another.$"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_was_expected(given, message):
    with pytest.raises(ValueError, match=message):
        read(**given)


@pytest.mark.parametrize("given", [{"optimizer": {"steps": True}}, {"optimizer": {"rate": False}}])
def test_a_bool_is_not_a_number(given):
    with pytest.raises(ValueError, match=r"^optimizer\.(steps|rate) is (True|False); expected a n"):
        read(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": {"kind": "adm"}}, r"one of 'adam' or 'sgd'. Did you mean 'adam'\?$"),
        ({"optimizer": {"kind": 3}}, r"^optimizer.kind is 3; expected one of 'adam' or 'sgd'.$"),
        ({"size": "smal"}, r"a whole number or one of .* Did you mean 'small'\?$"),
    ],
)
def test_a_choice_suggests_the_nearest(given, message):
    with pytest.raises(ValueError, match=message):
        read(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": {"rat": 1}}, r"setting 'optimizer.rat'. Did you mean 'optimizer.rate'\?"),
        ({"rate": 1}, r"^Unknown setting 'rate'. Did you mean 'optimizer.rate'\? Known: name, "),
        ({"nmae": 1}, r"Did you mean 'name'\?"),
        ({"optimizer": 3}, r"^optimizer is 3, but it is a section with the keys rate, steps, kind"),
        ({"optimizer": None}, r"^optimizer is None, but it is a section with the keys"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest(given, message):
    with pytest.raises(ValueError, match=message):
        read(**given)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"^The setting 'name' is missing.$"):
        from_mapping(Settings, {}, kind="setting")


def test_one_value_follows_the_same_rules():
    assert convert(float, "1e-2", "noise") == 0.01
    with pytest.raises(ValueError, match=r"^noise is 'x'; expected a number.$"):
        convert(float, "x", "noise")
    with pytest.raises(ValueError, match=r"^noise is True; expected a number.$"):
        convert(float, True, "noise")


def test_the_known_keys_are_those_of_sections_too():
    assert known_keys(Settings)[:3] == ["name", "parts", "optimizer.rate"]

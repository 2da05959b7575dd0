"""YAML files of settings and the words over them."""

import pytest

from moellava.storage.settings_file import override, read_settings


def test_words_go_into_sections_and_leave_the_rest(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {rate: 1, steps: 2}\nseeds: [0]\n")
    settings = read_settings(tmp_path / "a.yaml")
    override(settings, ["optim.rate=1e-4", "seeds=[1, 2]", "new.deep.key=null"])
    assert settings == {
        "optim": {"rate": "1e-4", "steps": 2},  # what YAML calls a number is the reader's matter
        "seeds": [1, 2],
        "new": {"deep": {"key": None}},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("- 1", "holds a list; expected keys"),
        ("a: [1", "a.yaml .* cannot be read as YAML"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("word", "message"), [("steps", "'steps' is not a setting"), ("a=[1", "is not valid YAML")]
)
def test_words_that_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        override({}, [word])


def test_a_later_word_wins():
    settings = {"steps": 1}
    override(settings, ["steps=2", "steps=3"])
    assert settings == {"steps": 3}

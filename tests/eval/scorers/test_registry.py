import subprocess
import sys

import pytest

from moellava.eval.scorers import SCORERS, Scorer, find_scorers, register_scorer


def always_right(answer, truth, *, answer_type, options=()):
    return {"accuracy": 1.0}


@pytest.fixture
def right_scorer():
    scorer = Scorer(name="always_right", version="1", score=always_right, summary="a test")
    yield scorer
    SCORERS.pop("always_right", None)


def test_all_rules_of_the_issue_are_there_and_explained():
    names = {"llava_med", "med_moe", "medevalkit", "slake_exact", "strict", "token_f1", "mcq"}
    assert {scorer.name for scorer in find_scorers()} >= names
    for name in names:
        text = SCORERS[name].score.__doc__ or ""
        assert "Formula" in text
        assert "nown faults" in text


@pytest.mark.parametrize("scorer", find_scorers(), ids=lambda scorer: scorer.name)
@pytest.mark.parametrize("answer_type", ["open", "closed", "choice"])
@pytest.mark.parametrize(
    "answer", ["", " ", "lung", "B", "yes", "\n", "🫁", "<answer>", "a" * 5000]
)
def test_every_scorer_gives_shares(scorer, answer_type, answer):
    options = ("lung", "heart") if answer_type == "choice" else ()
    scored = scorer.score(answer, "lung", answer_type=answer_type, options=options)
    assert all(0 <= value <= 1 for value in scored.values())


def test_a_registered_scorer_is_found_by_name(right_scorer):
    register_scorer(right_scorer)
    register_scorer(right_scorer)  # twice is no harm
    assert find_scorers(["strict", "always_right"]) == [SCORERS["strict"], right_scorer]


def test_a_taken_name_is_refused(right_scorer):
    other = Scorer(name="strict", version="1", score=always_right, summary="")
    with pytest.raises(ValueError, match="'strict' is taken"):
        register_scorer(other)


def test_an_unknown_scorer_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown scorer 'llavamed'\. Did you mean 'llava_med'"):
        find_scorers(["llavamed"])


def test_a_plugin_registers_a_scorer(tmp_path):
    """An installed package with the entry point, in a process of its own."""
    info = tmp_path / "length_scorer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: length_scorer\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moellava.scorers]\nlength = length_scorer:add\n")
    (tmp_path / "length_scorer.py").write_text(
        "from moellava.eval.scorers import Scorer, register_scorer\n"
        "def score(answer, truth, *, answer_type, options=()):\n"
        "    return {'same_length': float(len(answer) == len(truth))}\n"
        "def add():\n"
        "    register_scorer(Scorer(name='length', version='1', score=score, summary='length'))\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from moellava.eval.scorers import find_scorers\n"
        "[scorer] = find_scorers(['length'])\n"
        "print(scorer.score('ab', 'cd', answer_type='open', options=()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'same_length': 1.0}"

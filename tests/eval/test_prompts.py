import pytest

from moellava.eval.prompts import PROMPTS, find_prompt

NAMES = ["none", "short", "yes_no_all", "Say it in one word.", "Q: {question}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_never_depends_on_the_truth(name):
    prompt = find_prompt(name)
    asked = {
        prompt.write("Is it a CT?", truth, answer_type)
        for truth in ("yes", "no", "lung")
        for answer_type in ("open", "closed", "choice")
    }
    assert len(asked) == 1
    assert "Is it a CT?" in asked.pop()
    assert not prompt.uses_gold_type


def test_only_a_prompt_asked_for_by_name_uses_the_gold_type():
    assert [prompt.name for prompt in PROMPTS.values() if prompt.uses_gold_type] == ["medevalkit"]
    write = PROMPTS["medevalkit"].write
    assert write("Q?", "yes", "closed") != write("Q?", "lung", "open")


def test_where_free_text_goes():
    assert find_prompt("Be brief.").write("Q?", "", "open") == "Q?\nBe brief."
    assert find_prompt("Q: {question} A:").write("why", "", "open") == "Q: why A:"
    assert find_prompt("none").write("Q?", "", "open") == "Q?"


def test_a_misspelt_name_is_not_free_text():
    with pytest.raises(ValueError, match=r"Unknown prompt 'shrt'\. Did you mean 'short'"):
        find_prompt("shrt")

import pytest

from moellava.eval.rewards import format_reward, mcq_reward, scorer_reward, strict_reward


def test_strict_reward_of_closed_open_and_choice():
    rewards = strict_reward(
        completions=["Yes.", "normal", "left lung", "B"],
        truth=["yes", "no", "lung", "heart"],
        answer_type=["closed", "closed", "open", None],
        options=[None, None, None, ["lung", "heart"]],
    )
    assert rewards == pytest.approx([1.0, 0.0, 2 / 3, 1.0])


def test_conversational_completions_and_answer_tags():
    completions = [
        [{"role": "assistant", "content": "<think>no, or yes</think><answer>yes</answer>"}],
        [{"role": "assistant", "content": "yes and no"}],
    ]
    assert strict_reward(completions=completions, truth=["yes", "yes"]) == [1.0, 0.0]


def test_mcq_reward():
    options = [["lung", "heart"]] * 2
    assert mcq_reward(completions=["A", "A or B"], truth=["A", "A"], options=options) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>it is</think> <answer>yes</answer>", 1.0),
        ("<answer>yes</answer>", 0.0),
        ("<think>a</think><answer>yes</answer> and more", 0.0),
        ("yes", 0.0),
    ],
)
def test_format_reward(text, reward):
    assert format_reward(completions=[text]) == [reward]


def test_a_data_set_without_truths_is_an_error():
    with pytest.raises(ValueError, match="no column 'truth'"):
        strict_reward(completions=["yes"])


def test_an_unknown_scorer_is_named():
    with pytest.raises(ValueError, match="Did you mean 'strict'"):
        scorer_reward("strikt")


@pytest.mark.slow
def test_one_step_of_grpo(tmp_path):
    """TRL calls the rewards with the data set's columns and learns from them."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moellava.testing import write_tinyllama

    folder = tmp_path / "tinyllama"
    write_tinyllama(
        folder, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=420,
    )  # fmt: skip
    calls = []

    def counted(completions, truth, **columns):
        calls.append(len(truth))
        return [float(len(text)) for text in completions]  # never all the same

    rows = datasets.Dataset.from_dict(
        {"prompt": ["Is it CT?"] * 4, "truth": ["yes", "no", "yes", "no"]}
    )
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=[strict_reward, format_reward, counted],
        train_dataset=rows,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2,
            num_generations=2, max_completion_length=4, report_to=[], use_cpu=True, bf16=False,
            logging_steps=1,
        ),
    )  # fmt: skip
    trainer.train()
    assert calls
    logged = trainer.state.log_history[0]
    assert 0 <= logged["rewards/strict_reward/mean"] <= 1
    assert logged["rewards/format_reward/mean"] == 0.0

"""Rows whose images were trained on."""

from moellava.data import Row, Turn
from moellava.eval.run import evaluate
from tests.eval.samples import settings


def test_leaks_are_counted_and_left_out_of_a_second_score(
    tiny_loaded, eval_rows, eval_folder, tmp_path
):
    training = [Row(id="t", images=(eval_rows[0].images[0],), turns=(Turn("user", "<image>"),))]
    scores = evaluate(tiny_loaded, eval_rows, tmp_path, settings(), leaks=training)
    assert scores["leaks"]["num_leaked"] == 4
    assert scores["leaks"]["leaked"] == ["0-0", "0-1", "0-2", "0-3"]
    kept = scores["leaks"]["without_leaked"]["scorers"]["strict"]["metrics"]["accuracy"]
    assert kept["n"] == 26

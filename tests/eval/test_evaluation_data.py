"""Data that cannot be evaluated says so."""

import json

import pytest

from moellava.data import Row, Turn
from moellava.eval.run import evaluate
from tests.eval.samples import settings


def test_rows_without_answers_are_an_error(tiny_loaded, tmp_path):
    rows = [Row(id="1", images=(), turns=(Turn("user", "Q?"),))]
    with pytest.raises(ValueError, match="none of 1 rows has an answer"):
        evaluate(tiny_loaded, rows, tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"rows\.json.*no row"),
        ([("1", "CT?", " ")], {}, r"rows\.json, row 0 \(id '1'\): turn 1 \(assistant\) is empty"),
        ([("1", "CT?", "yes")], {"split": "test"}, r"rows\.json: no usable row of split 'test'"),
    ],
)
def test_data_without_truths_or_rows_is_named(tiny_loaded, tmp_path, rows, options, message):
    records = [
        {"id": row_id, "conversations": [{"from": "human", "value": question},
                                         {"from": "gpt", "value": answer}]}
        for row_id, question, answer in rows
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_loaded, tmp_path / "rows.json", tmp_path / "out", settings(), **options)

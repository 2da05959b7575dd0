"""Scores as text."""

from moellava.eval.text_table import difference_table, text_table


def metric(value, **more):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40, **more}


def test_every_metric_stands_with_its_interval_and_baselines():
    metrics = {"accuracy": metric(0.5), "open_f1": metric(0.25)}
    blank = {"scorers": {"strict": {"metrics": {"accuracy": metric(0.3)}}}}
    scores = {"scorers": {"strict": {"metrics": metrics}}, "baselines": {"blank": blank}}
    head, first, second = text_table(scores).splitlines()
    assert head.split("  ")[0] == "scorer"
    assert head.endswith("blank")
    assert first.split() == ["strict", "accuracy", "50.0", "40.0", "to", "60.0", "40", "30.0"]
    assert second.split() == ["strict", "open_f1", "25.0", "15.0", "to", "35.0", "40"]
    assert len(first) == len(head)


def test_differences_stand_with_what_changed_and_by_group():
    changed = {"only_first": 3, "only_second": 7, "mcnemar_p": 0.34375}
    scorers = {"strict": {"metrics": {"accuracy": metric(-0.1, **changed), "f1": metric(0.0)}}}
    comparison = {"scorers": scorers, "groups": {"modality": {"CT": {"scorers": scorers}}}}
    whole = difference_table(comparison).splitlines()
    assert whole[1].split()[-3:] == ["3", "7", "0.344"]
    assert whole[2].split()[-1] == "40"
    parts = difference_table(comparison, ["modality"])
    assert "\nmodality: CT\n" in parts
    assert parts.count("0.344") == 2

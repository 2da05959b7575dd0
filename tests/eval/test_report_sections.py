"""What stands where in the report."""

from moellava.eval.predictions import Prediction
from moellava.eval.results import write_results


def test_what_a_reader_has_to_know_stands_above_the_list(report):
    above = report.split('id="questions"')[0]
    assert "1 answers reached the most new tokens" in above
    assert "1 questions are about images of the training set" in above
    for title in ("What the image adds", "Without leaked images", "Closed answers", "Settings"):
        assert f"<h2>{title}</h2>" in above


def test_every_group_has_its_calibration_picture(tmp_path):
    rows = [
        Prediction(
            id=str(number), answer=truth, truth=truth, answer_type="closed",
            answer_type_from="data", groups={"modality": "CT<" if number < 4 else "MR"},
            probabilities={"yes": number / 10, "no": 1 - number / 10},
        )
        for number, truth in enumerate(["no", "yes", "no", "yes", "yes", "yes"])
    ]  # fmt: skip
    scores = write_results(tmp_path, rows, num_resamples=50)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("all", "modality: CT&lt;", "modality: MR"):
        assert f"<figcaption>{name}</figcaption>" in page
    area = scores["probabilities"]["all"]["auroc"]
    assert f'<td class="number">{area["value"]:.3f}</td>' in page
    assert f"{area['low']:.3f} to {area['high']:.3f}" in page

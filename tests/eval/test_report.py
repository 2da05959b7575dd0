import html.parser
import json
import re

import pytest
from PIL import Image

from moellava.eval.charts import Bar, bars
from moellava.eval.confusion import NEITHER, confusion_tables
from moellava.eval.predictions import Prediction
from moellava.eval.results import write_results

EVIL = "</script><script>alert(1)</script><b>\u2028"


def prediction(number, answer, truth="yes", answer_type="closed", **more):
    return Prediction(
        id=f"{number}{EVIL}", images=(f"{number % 2}.png{EVIL}",), question=f"Is it {EVIL}?",
        answer=answer, truth=truth, answer_type=answer_type, answer_type_from="data",
        groups={"modality": EVIL}, **more,
    )  # fmt: skip


@pytest.fixture
def report(tmp_path):
    rows = [
        prediction(0, "yes"), prediction(1, f"no {EVIL}", is_cut=True), prediction(2, "yes or no"),
        prediction(3, "lung", f"lung {EVIL}", "open"), prediction(4, "yes", "no"),
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{row.as_line()}\n" for row in rows), encoding="utf-8")
    write_results(
        tmp_path, rows, num_resamples=20, baselines={"blank": path}, leaked=[rows[0].id],
        facts={"checkpoint": EVIL, "data": EVIL},
        load_image=lambda name: Image.new("RGB", (300, 200), (200, 0, 0)),
    )  # fmt: skip
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class _Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.scripts, self.inside, self.sources, self.opened = [], False, [], []

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.opened.append(tag)

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_nothing_of_the_data_becomes_markup(report):
    tags = _Tags()
    tags.feed(report)
    assert len(tags.scripts) == 2  # the data and our own
    assert "b" not in tags.opened or report.count("<b>") == report.count("</b>")
    assert "alert(1)</script><b>" not in report
    assert "\u2028" not in tags.scripts[0]


def test_the_page_needs_no_network(report):
    tags = _Tags()
    tags.feed(report)
    assert tags.sources == []
    assert "default-src 'none'" in report
    assert not re.search(r"""(https?:)?//[a-z]""", report.split('<script id="data"')[0])


def test_the_list_has_the_worst_first_with_thumbnails(report):
    tags = _Tags()
    tags.feed(report)
    data = json.loads(tags.scripts[0])
    first = data["scorers"].index("strict")
    scores = [row["scores"][first] for row in data["rows"]]
    assert scores == sorted(scores)
    assert len(data["pictures"]) == 2
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in data["pictures"])
    assert data["rows"][0]["question"] == f"Is it {EVIL}?"
    assert sum(row["cut"] for row in data["rows"]) == 1


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


def test_confusion_counts_both_and_neither_apart():
    rows = [
        prediction(0, "yes"), prediction(1, "no"), prediction(2, "yes and no"),
        prediction(3, "normal", "no"), prediction(4, "no", "no"),
    ]  # fmt: skip
    [table] = confusion_tables(rows)
    assert table.counts == {
        ("yes", "yes"): 1, ("yes", "no"): 1, ("yes", NEITHER): 1, ("no", NEITHER): 1,
        ("no", "no"): 1,
    }  # fmt: skip


def test_confusion_of_options_that_questions_share():
    options = ("lung", "heart")
    rows = [
        prediction(n, answer, "lung", "choice", options=options)
        for n, answer in enumerate(["A", "heart", "A or B"])
    ]
    [table] = confusion_tables(rows)
    assert table.counts == {("lung", "lung"): 1, ("lung", "heart"): 1, ("lung", NEITHER): 1}


def test_bars_are_in_proportion_and_escaped():
    picture = bars([Bar("<a>", 0.25, 0.2, 0.3), Bar("b" * 50, 0.5, 0.5, 0.5)], "t")
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', picture)]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert "<a>" not in picture
    assert "25.0 (20.0–30.0)" in picture

"""The page of a report."""

import html.parser
import json
import re

from tests.eval.samples import EVIL


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

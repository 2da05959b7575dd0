"""Bars of the report."""

import re

import pytest

from moellava.eval.charts import Bar, bars


def test_bars_are_in_proportion_and_escaped():
    picture = bars([Bar("<a>", 0.25, 0.2, 0.3), Bar("b" * 50, 0.5, 0.5, 0.5)], "t")
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', picture)]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert "<a>" not in picture
    assert "25.0 (20.0–30.0)" in picture

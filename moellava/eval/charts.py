"""Numbers → inline SVG, without a library: `bars`, `reliability`."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LABEL_WIDTH, _PLOT_WIDTH, _VALUE_WIDTH = 270, 360, 210
_BAR_HEIGHT, _GAP, _TOP = 16, 6, 20
_SIZE = 240  # of the reliability picture


@dataclass(frozen=True)
class Bar:
    """A share in 0..1 with its interval; `note` stands behind the numbers."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""


def bars(entries: Sequence[Bar], title: str) -> str:
    """Horizontal bars from 0 to 1, each with a whisker for its interval."""
    height = _TOP + len(entries) * (_BAR_HEIGHT + _GAP) + 4
    width = _LABEL_WIDTH + _PLOT_WIDTH + _VALUE_WIDTH
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="12">{100 * tick:g} %</text>')
    for number, bar in enumerate(entries):
        y = _TOP + number * (_BAR_HEIGHT + _GAP) + _GAP / 2
        middle = y + _BAR_HEIGHT / 2
        width_of_bar = max(_x(bar.value) - _x(0), 0.5)
        parts += [
            f'<text class="label" x="{_LABEL_WIDTH - 8}" y="{middle + 4:.1f}">'
            f"{escape(_short(bar.label))}<title>{escape(bar.label)}</title></text>",
            f'<rect class="bar" x="{_x(0):.1f}" y="{y:.1f}" width="{width_of_bar:.1f}" '
            f'height="{_BAR_HEIGHT}"/>',
            f'<line class="whisker" x1="{_x(bar.low):.1f}" x2="{_x(bar.high):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>',
            f'<text class="value" x="{_x(1) + 8:.1f}" y="{middle + 4:.1f}">'
            f"{_percent(bar.value)} ({_percent(bar.low)}–{_percent(bar.high)})"
            f"{escape(bar.note)}</text>",
        ]
    return "".join([*parts, "</svg>"])


def reliability(bins: Sequence[tuple[float, float, int]], title: str) -> str:
    """Accuracy over confidence, a circle for each bin, as large as its share of the rows.

    Args:
        bins: (confidence, accuracy, count).
    """
    total = sum(count for _, _, count in bins) or 1
    margin, side = 34, _SIZE - 48
    parts = [
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" width="{_SIZE}" height="{_SIZE}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect class="frame" x="{margin}" y="10" width="{side}" height="{side}"/>',
        f'<line class="grid" x1="{margin}" y1="{10 + side}" x2="{margin + side}" y2="10"/>',
    ]
    for confidence, accuracy, count in bins:
        radius = 3 + 12 * (count / total) ** 0.5
        parts.append(
            f'<circle class="dot" cx="{margin + side * confidence:.1f}" '
            f'cy="{10 + side * (1 - accuracy):.1f}" r="{radius:.1f}">'
            f"<title>{count} answers: confidence {confidence:.2f}, right {accuracy:.2f}</title>"
            "</circle>"
        )
    parts += [
        f'<text class="tick" x="{margin + side / 2}" y="{_SIZE - 6}">confidence</text>',
        f'<text class="tick" transform="translate(12 {10 + side / 2}) rotate(-90)">right</text>',
        f'<text class="tick" x="{margin}" y="{24 + side}">0</text>',
        f'<text class="tick" x="{margin + side}" y="{24 + side}">1</text>',
    ]
    return "".join([*parts, "</svg>"])


def _x(share: float) -> float:
    return _LABEL_WIDTH + _PLOT_WIDTH * min(max(share, 0.0), 1.0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _short(label: str, most: int = 38) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"

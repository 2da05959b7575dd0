"""An `Explanation` → a folder of PNGs and one HTML page that holds them all.

| name | what it gives |
|---|---|
| `write_page` | the folder; the path of its `index.html` |
"""

import base64
import html
from pathlib import Path
from string import Template

import numpy as np

from moellava.explain.explanation import KINDS, Explanation

_PAGE = Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$question</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; margin: 0; font-weight: 600; }
.answer { font-size: 1.5rem; margin: .2rem 0 1rem; }
figure { margin: 2rem 0; border-top: 1px solid var(--line); padding-top: 1rem; }
figcaption { margin-bottom: .6rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
.tokens span { background: rgb(0 114 178 / var(--p)); border-radius: 3px; padding: .1em .15em; }
.note { color: color-mix(in srgb, currentColor 65%, transparent); font-size: .9rem; }
</style>
<h1>$question</h1>
<p class="answer">$answer</p>
<p class="tokens">$tokens</p>
<p class="note">Shading: the probability of each token. Research use only, not a medical device.</p>
$figures
</html>
"""
)

_CAPTIONS = {
    "attention": "Attention of the answer to the image: mean over layers, heads and answer tokens. "
    "Attention is not a cause: compare it with the blank image beside it, and with the ablation.",
    "rollout": "Attention rollout: attention followed through the layers, half of each token kept.",
    "ablation": "What the answer loses when one block of the picture becomes its mean colour. Red "
    "supports the answer. Blocks that stand in for each other can both look unimportant.",
    "gradient": "Gradient times input: a first-order estimate of the ablation.",
    "tokens": "Attention to the image, one map for each token of the answer.",
    "heads": "How much of its attention each layer and head gives to the image.",
    "load": "Experts that each token went to, counted over all chosen experts.",
    "pathways": "Weight that goes from the experts of one sparse layer to those of the next.",
}


def write_page(explanation: Explanation, folder: Path | str) -> Path:
    """Draw all that an explanation holds into a folder, and a page that shows it.

    Returns:
        The path of `index.html`, which holds its pictures and needs no other file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = _draw_all(explanation, folder)
    figures = [
        f"<figure><figcaption>{html.escape(_caption(name))}</figcaption>"
        f'<img alt="{html.escape(name)}" src="{_as_uri(folder / f"{name}.png")}"></figure>'
        for name in names
    ]
    if explanation.no_grid:
        figures.insert(0, f'<p class="note">{html.escape(explanation.no_grid)}</p>')
    page = _PAGE.substitute(
        question=html.escape(explanation.question),
        answer=html.escape(explanation.answer),
        tokens=_shaded(explanation),
        figures="\n".join(figures),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _draw_all(explanation: Explanation, folder: Path) -> list[str]:
    """Write every picture that there is; their names."""
    names = []
    for kind in KINDS:
        if not _has(explanation, kind):
            continue
        for image in range(len(explanation.pictures)):
            name = kind if len(explanation.pictures) == 1 else f"{kind}-{image + 1}"
            explanation.draw_overlay(folder / f"{name}.png", kind=kind, image=image)
            names.append(name)
    if explanation.grid is not None and len(explanation.tokens) > 1:
        explanation.draw_tokens(folder / "tokens.png")
        names.append("tokens")
    explanation.draw_heads(folder / "heads.png")
    names.append("heads")
    if explanation.routing is not None:
        explanation.draw_load(folder / "load.png")
        names.append("load")
        if len(explanation.routing.layers) > 1:
            explanation.draw_pathways(folder / "pathways.png")
            names.append("pathways")
    return names


def _has(explanation: Explanation, kind: str) -> bool:
    if kind in ("attention", "rollout"):
        return explanation.grid is not None
    return getattr(explanation, kind) is not None


def _caption(name: str) -> str:
    kind, _, number = name.partition("-")
    return _CAPTIONS[kind] + (f" Image {number}." if number else "")


def _as_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _shaded(explanation: Explanation) -> str:
    probabilities = np.exp(explanation.logprobs)
    return "".join(
        f'<span style="--p: {0.5 * probability:.2f}" title="p = {probability:.3f}">'
        f"{html.escape(token)}</span>"
        for token, probability in zip(explanation.tokens, probabilities, strict=True)
    )

"""The picture of a run."""

import json

from matplotlib.figure import Figure

from moellava.train.log.picture import save_picture


def test_the_picture_names_the_sparse_layers_by_their_index(chain, tmp_path, monkeypatch):

    drawn = []
    own = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: (drawn.append(self), own(self, *args, **more)),
    )
    save_picture(
        json.loads((chain / "experts" / "log.json").read_text()), tmp_path / "p.png", title="t"
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000
    layers = [axis for axis in drawn[0].axes if axis.get_ylabel() == "layer"]
    assert [[label.get_text() for label in axis.get_yticklabels()] for axis in layers] == [
        ["1"],
        ["1"],
    ]

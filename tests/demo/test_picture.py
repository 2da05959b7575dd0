"""The demo's picture shows what was answered."""

import numpy as np
from PIL import Image

from moellava.data import Row, Turn
from moellava.demo.images import MODALITIES
from moellava.demo.picture import save_picture
from moellava.demo.run import HeldOutAnswer


def answers(folder, said: str) -> list[HeldOutAnswer]:
    found = []
    for modality in MODALITIES:
        path = folder / f"{modality}.png"
        Image.new("RGB", (64, 64), (0, 0, 200)).save(path)
        turns = (Turn("user", "<image>\nWhat modality is this?"), Turn("assistant", modality))
        row = Row(id=modality, images=(str(path),), turns=turns, extra={"modality": modality})
        found.append(HeldOutAnswer(row, said or modality, "", ""))
    return found


def num_red(path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)).sum())


def test_wrong_answers_alone_are_red(tmp_path):
    save_picture(answers(tmp_path, said=""), tmp_path / "right.png")
    save_picture(answers(tmp_path, said="a cat"), tmp_path / "wrong.png")
    assert num_red(tmp_path / "right.png") == 0
    assert num_red(tmp_path / "wrong.png") > 500

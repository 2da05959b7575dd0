"""Toy stand-ins of a published encoder and language model that have learned something before.

BiomedCLIP has seen medical images and TinyLlama can read; the untrained stand-ins of
`moellava.testing` have not and cannot, and a frozen part that knows nothing teaches nothing about
stages in which it is frozen. `write_trained_parts` makes them know the demo's world in minutes: the
encoder tells modalities apart, the language model answers about a modality's name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moellava.data import read_rows
from moellava.demo.questions import corpus
from moellava.encoders import VisionEncoder, create_encoder
from moellava.images import ImageLike, load_image
from moellava.model.builder_enhanced import load_pretrained_model
from moellava.testing import write_biomedclip, write_tinyllama
from moellava.train import load_recipe, train

BATCH_SIZE = 32


def write_trained_parts(
    folder: Path,
    files: Mapping[str, Path],
    *,
    tower_steps: int = 150,
    text_steps: int = 250,
    seed: int = 0,
) -> dict[str, str]:
    """Write both parts.

    Args:
        folder: receives them.
        files: of `moellava.demo.dataset.write_dataset`.
        tower_steps, text_steps: optimizer steps, 32 rows each.

    Returns:
        `model_name_or_path` and `mm_vision_tower`, as `load_pretrained_model` takes them.
    """
    images = files["captions"].with_name("images")
    tower = create_encoder(
        "biomedclip",
        str(write_biomedclip(folder / "untrained", vision="test_vit", image_size=160, seed=seed)),
    )
    captions = read_rows(str(files["captions"]), images=images)
    teach_tower(tower, [(row.images[0], row.answer or "") for row in captions], tower_steps, seed)
    tower.save_pretrained(folder / "biomedclip_toy")
    return {
        "model_name_or_path": str(
            _write_language_model(folder, files["descriptions"], text_steps, seed)
        ),
        "mm_vision_tower": str(folder / "biomedclip_toy"),
    }


def teach_tower(
    tower: VisionEncoder, captioned: Sequence[tuple[ImageLike, str]], num_steps: int, seed: int
) -> None:
    """Teach a tower to tell captions apart.

    They are classes of a linear head on the mean patch token, which is thrown away afterwards.
    """
    labels = sorted({caption for _, caption in captioned})
    targets = torch.tensor([labels.index(caption) for _, caption in captioned])
    pictures = [load_image(image) for image, _ in captioned]
    pixels = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(tower.hidden_size, len(labels))
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05
    )
    tower.train()
    for _ in range(num_steps):
        batch = torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        seen = _altered(pixels[batch], generator)
        logits = head(tower(seen).patch_tokens.mean(1))
        torch.autograd.backward(F.cross_entropy(logits, targets[batch]))
        optimizer.step()
    tower.train(False)


def _altered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Another contrast, brightness, side and crop.

    Few pictures, cut into many crops, are soon known by heart.
    """
    random = torch.rand(4, len(pixels), 1, 1, 1, generator=generator)
    pixels = pixels * (0.8 + 0.4 * random[0]) + 0.6 * (random[1] - 0.5)
    flips = [axis for axis, chance in ((2, random[2, 0]), (3, random[3, 0])) if chance < 0.5]
    side = pixels.shape[-1]
    size = int(torch.randint(int(0.6 * side), side + 1, (1,), generator=generator))
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    return F.interpolate(
        pixels.flip(flips)[:, :, top : top + size, left : left + size], size=side, mode="bilinear"
    )


def _write_language_model(folder: Path, descriptions: Path, num_steps: int, seed: int) -> Path:
    untrained = write_tinyllama(
        folder / "untrained_llama",
        hidden_size=128,
        intermediate_size=256,
        vocab_size=800,
        corpus=corpus(),
        seed=seed,
    )
    recipe = {
        "stage": "tune",
        "after": "any",
        "output_dir": str(folder / "text_run"),
        "model": {
            "model_name_or_path": str(untrained), "mm_vision_tower": str(folder / "biomedclip_toy"),
        },
        "trainable": ["language_model"],
        "data": {"train": str(descriptions), "num_workers": 0},
        "optim": {
            "learning_rate": 2e-3, "batch_size": BATCH_SIZE, "per_device_batch_size": BATCH_SIZE,
            "max_steps": num_steps, "precision": "fp32",
        },
        "logging": {"report_to": []},
        "seed": seed,
    }  # fmt: skip
    trained = load_pretrained_model(train(load_recipe(recipe), show_progress=False).model_folder)
    state_dict = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in trained.model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    language_model = LlamaForCausalLM.from_pretrained(
        None, config=trained.model.config.text_config, state_dict=state_dict
    )
    language_model.save_pretrained(folder / "tinyllama_toy")
    trained.tokenizer.save_pretrained(folder / "tinyllama_toy")
    return folder / "tinyllama_toy"

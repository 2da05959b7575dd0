"""A model's inputs → how much each part of the image bears on the answer, on pixels.

Letters: A answer tokens, I images, R x C blocks of pixels.

| name | what it gives |
|---|---|
| `AnswerScorer` | pixel values → log-probability of each answer token |
| `mean_colour` | the image with nothing on it: each image's own mean colour |
| `ablation_map` | what the answer loses when one block becomes that colour |
| `gradient_map` | gradient times input, against that colour |
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moellava.model.modeling_moellava import MoeLlavaForConditionalGeneration

Array = npt.NDArray[np.float32]


class AnswerScorer:
    """Log-probabilities of a fixed answer, for any pixels in the place of the images.

    Args:
        input_ids: (1, T), the prompt and then the answer.
        num_prompt_tokens: how many of them are the prompt.
        image_sizes: as the processor returns them, for a model that needs them.
    """

    def __init__(
        self,
        model: MoeLlavaForConditionalGeneration,
        input_ids: Tensor,
        num_prompt_tokens: int,
        image_sizes: Tensor | None = None,
    ) -> None:
        self.model, self.input_ids, self.image_sizes = model, input_ids, image_sizes
        self.answer_ids = input_ids[0, num_prompt_tokens:]

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(B, I, 3, H, W) → (B, A), in nats."""
        num_variants, sizes = len(pixel_values), self.image_sizes
        logits: Tensor = self.model(
            input_ids=self.input_ids.expand(num_variants, -1),
            pixel_values=pixel_values.flatten(0, 1),
            image_sizes=None if sizes is None else sizes.repeat(num_variants, 1),
            use_cache=False,
            logits_to_keep=len(self.answer_ids) + 1,
        ).logits  # (B, A + 1, V)
        chosen = self.answer_ids.expand(num_variants, -1)[..., None]
        return logits[:, :-1].float().log_softmax(-1).gather(2, chosen)[..., 0]


def mean_colour(pixel_values: Tensor) -> Tensor:
    """Each image's own mean colour everywhere, in the shape of (..., 3, H, W)."""
    return pixel_values.mean((-2, -1), keepdim=True).expand_as(pixel_values)


def mix_blocks(pixel_values: Tensor, keep: Tensor) -> Tensor:
    """Keep blocks of pixels and give the others the mean colour.

    Args:
        pixel_values: (I, 3, H, W).
        keep: (B, I, R, C), 1 to keep and 0 to blank.

    Returns:
        (B, I, 3, H, W).
    """
    height, width = pixel_values.shape[-2:]
    rows = torch.arange(height, device=keep.device) * keep.shape[2] // height
    columns = torch.arange(width, device=keep.device) * keep.shape[3] // width
    share = keep[:, :, rows][:, :, :, columns].unsqueeze(2).to(pixel_values.dtype)
    return share * pixel_values + (1 - share) * mean_colour(pixel_values)


def ablation_map(
    scorer: AnswerScorer,
    pixel_values: Tensor,
    blocks: tuple[int, int],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> Array:
    """The log-probability that each answer token loses without each block of pixels.

    Positive where the block supports the answer. The blocks are blanked one at a time by captum's
    `FeatureAblation`, so blocks that stand in for each other can both look unimportant.

    Args:
        pixel_values: (I, 3, H, W).
        blocks: rows and columns of blocks.

    Returns:
        (A, I, rows, columns) float32, in nats.
    """
    try:
        from captum.attr import FeatureAblation
    except ImportError as error:
        raise ImportError(
            "A causal map needs captum. Type: pip install 'moellava[explain]'"
        ) from error

    present = torch.ones(1, len(pixel_values), *blocks, device=pixel_values.device)
    ablation = FeatureAblation(lambda keep: scorer(mix_blocks(pixel_values, keep)))
    lost: Tensor = ablation.attribute(
        present,
        baselines=0.0,
        perturbations_per_eval=batch_size,
        show_progress=progress,
    )
    return lost.cpu().numpy().astype(np.float32)


def gradient_map(scorer: AnswerScorer, pixel_values: Tensor, blocks: tuple[int, int]) -> Array:
    """Gradient of the answer's log-probability times (pixel minus mean colour), summed over blocks.

    A first-order estimate of `ablation_map`, at the price of one pass forwards and one backwards.

    Returns:
        (I, rows, columns) float32, in nats.
    """
    pixels = pixel_values.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(scorer(pixels[None]).sum(), pixels)
    effect = (gradient * (pixel_values - mean_colour(pixel_values))).float().sum(1)  # (I, H, W)
    height, width = effect.shape[-2:]
    rows = torch.arange(height, device=effect.device) * blocks[0] // height
    columns = torch.arange(width, device=effect.device) * blocks[1] // width
    summed = torch.zeros(len(effect), *blocks, device=effect.device)
    cells = rows[:, None] * blocks[1] + columns[None, :]
    summed.flatten(1).index_add_(1, cells.flatten(), effect.flatten(1))
    return summed.cpu().numpy()

"""Projectors with queries of their own: any number of patch tokens in, a fixed number out.

The attention is transformers' (Idefics2's Perceiver, BLIP-2's Q-Former). Imported when such a
projector is built.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler


class LatentResampler(Idefics2PerceiverResampler):
    """Idefics2's resampler with latents that differ: its own are all ones, and would stay equal."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, Idefics2PerceiverResampler):
            init.normal_(module.latents, mean=0.0, std=self.config.initializer_range)


class PerceiverProjector(nn.Module):
    """(B, N, D_vision) → (B, num_latents, D_text): a linear map, then latents that attend to it.

    From Idefics2, arXiv 2405.02246.
    """

    def __init__(
        self, vision_width: int, text_width: int, num_latents: int, num_layers: int
    ) -> None:
        super().__init__()
        _require_positive(num_latents=num_latents, num_layers=num_layers)
        head_dim = 64
        if text_width % head_dim:
            head_dim = next(width for width in (32, 16, 8, 4, 2, 1) if text_width % width == 0)
        num_heads = text_width // head_dim
        config = Idefics2PerceiverConfig(
            hidden_size=text_width,
            resampler_n_latents=num_latents,
            resampler_depth=num_layers,
            resampler_n_heads=num_heads,
            resampler_head_dim=head_dim,
            num_key_value_heads=num_heads,
        )
        self.input_projection = nn.Linear(vision_width, text_width)
        self.resampler = LatentResampler._from_config(config)  # type: ignore[no-untyped-call]

    def forward(self, patch_tokens: Tensor) -> Tensor:
        context = self.input_projection(patch_tokens)  # (B, N, D_text)
        mask = torch.ones(context.shape[:2], dtype=torch.long, device=context.device)
        image_embeds: Tensor = self.resampler(context, mask)
        return image_embeds


class QFormerProjector(nn.Module):
    """(B, N, D_vision) → (B, num_query_tokens, D_text): BLIP-2's Q-Former, then a linear map.

    From arXiv 2301.12597.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        num_query_tokens: int,
        num_layers: int,
        hidden_size: int,
    ) -> None:
        super().__init__()
        _require_positive(num_query_tokens=num_query_tokens, num_layers=num_layers)
        if hidden_size < 1 or hidden_size % 64:
            raise ValueError(
                f"hidden_size of the Q-Former is {hidden_size}; "
                "give a multiple of 64, the head's width."
            )
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            intermediate_size=4 * hidden_size,
            encoder_hidden_size=vision_width,
        )
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_tokens, hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.qformer = Blip2QFormerModel._from_config(config)
        self.output_projection = nn.Linear(hidden_size, text_width)

    def forward(self, patch_tokens: Tensor) -> Tensor:
        queries = self.query_tokens.expand(patch_tokens.shape[0], -1, -1)
        output = self.qformer(query_embeds=queries, encoder_hidden_states=patch_tokens)
        hidden: Tensor = output.last_hidden_state.to(self.output_projection.weight.dtype)
        image_embeds: Tensor = self.output_projection(hidden)
        return image_embeds


def _require_positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} of the projector is {value}; give at least 1.")

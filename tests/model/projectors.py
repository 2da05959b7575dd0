"""Small projectors."""

from moellava.model.projector import ProjectorShape

# Small enough to train in a test; the registry's defaults are the papers'.
SMALL = {
    "perceiver": {"num_latents": 5, "num_layers": 1},
    "qformer": {"num_query_tokens": 6, "num_layers": 2, "hidden_size": 64},
}


def shape(vision_width=12, text_width=20, grid=(4, 6), num_patches=None) -> ProjectorShape:
    count = grid[0] * grid[1] if num_patches is None else num_patches
    return ProjectorShape(
        vision_width=vision_width, text_width=text_width, num_patches=count, grid=grid
    )

"""An experiment so small that it takes seconds: a dense model against a mixture."""

from tests.train.tiny import parts_of, tiny_settings


def experiment_settings(tiny, out, **more):
    """Stages `tune` and `experts` on the rows of tests/train/tiny.py; `more` replaces sections."""
    common = tiny_settings(tiny)
    optim = {**common["optim"], "max_steps": 2}
    return {
        "name": "tiny",
        "output_dir": str(out),
        "common": {**common, "optim": optim, "saving": {"every": 1}},
        "stages": [
            {"stage": "tune", "after": "any", "model": parts_of(tiny)},
            {"stage": "experts"},
        ],
        "variants": {
            "dense": {"moe": False},
            "mixture": {
                "moe": {
                    "config": {
                        "moe_layers": "dense",
                        "num_experts": 4,
                        "num_experts_per_tok": 2,
                        "moe_intermediate_size": 32,
                    }
                }
            },
        },
        "evaluation": {
            "data": str(tiny / "rows.json"),
            "images": str(tiny / "images"),
            "max_new_tokens": 3,
            "batch_size": 3,
            "baselines": ["blank", "most_frequent"],
            "scorers": ["strict", "token_f1"],
            "num_resamples": 10,
        },
        **more,
    }


def med_moe(tiny):
    """Sections for the path of Med-MoE: a router for the modalities, then the experts."""
    return {
        "stages": [
            {"stage": "tune", "after": "any", "model": parts_of(tiny)},
            {"recipe": "med_moe_router", "optim": {"epochs": 1}},
            {"recipe": "med_moe_experts"},
        ],
        "variants": {"mixture": {"moe": {"config": {"moe_layers": [1], "num_experts": 4}}}},
    }

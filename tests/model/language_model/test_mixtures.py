"""Checkpoints written in the layouts of others, read back into ours."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, PhiConfig

from moellava.model.language_model import (
    LlamaMoeConfig,
    LlamaMoeForCausalLM,
    import_mixture,
    imported_state_dict,
)
from moellava.testing import in_fresh_memory


def make_mixtral(tiny, **fields):
    torch.manual_seed(0)
    options = {"initializer_range": 0.2, "num_local_experts": 4, "sliding_window": None, **fields}
    return MixtralForCausalLM(MixtralConfig(**tiny, **options)).eval()


def write_moe_llava(
    folder, tiny, state_dict, *, layers, top_k, claimed_experts=4, image_side=True, **moe
):
    """MoE-LLaVA's stage III checkpoint: DeepSpeed's names, `moe` in the config, an image side."""
    renamed = {}
    for name, value in state_dict.items():
        prefix, _, suffix = name.partition(".mlp.")
        if suffix == "experts.gate_up_proj":
            for expert, fused in enumerate(value):
                base = f"{prefix}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}"
                renamed[f"{base}.gate_proj.weight"], renamed[f"{base}.up_proj.weight"] = (
                    fused.chunk(2)
                )
        elif suffix == "experts.down_proj":
            for expert, down in enumerate(value):
                base = f"{prefix}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}"
                renamed[f"{base}.down_proj.weight"] = down
        elif suffix.startswith("gate."):
            renamed[f"{prefix}.mlp.deepspeed_moe.gate.wg.{suffix[5:]}"] = value
        elif suffix.startswith("meta_expert."):
            renamed[f"{prefix}.mlp.meta_moe.{suffix[12:]}"] = value
        else:
            renamed[name] = value
    if image_side:
        renamed["model.mm_projector.0.weight"] = torch.zeros(2, 2)
        renamed["model.image_tower.image_tower.vision_model.pre_layrnorm.weight"] = torch.zeros(2)
    folder.mkdir()
    save_file(
        {name: value.clone().contiguous() for name, value in renamed.items()},
        folder / "model.safetensors",
    )
    config = LlamaConfig(**tiny).to_dict() | {
        "model_type": "moe_llava_llama",
        "architectures": ["MoELLaVALlamaForCausalLM"],
        "mm_hidden_size": 1024,
        "moe": {
            "moe_enable": True,
            "moe_layers_idx": layers,
            "num_experts": [claimed_experts] * len(layers),
            "top_k_experts": top_k,
            "use_residual": False,
            "capacity_factor": 1.5,
            "router_aux_loss_coef": 0.01,
            **moe,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mixtral_checkpoint_keeps_its_logits(tiny, ids, tmp_path):
    mixtral = make_mixtral(tiny)
    mixtral.save_pretrained(tmp_path, max_shard_size="60KB")
    imported = in_fresh_memory(import_mixture(tmp_path))
    assert isinstance(imported, LlamaMoeForCausalLM)
    assert torch.equal(imported(ids).logits, mixtral(ids).logits)


def test_moe_llava_checkpoint_keeps_its_logits(tiny, ids, tmp_path, caplog):
    mixtral = make_mixtral(
        {**tiny, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        rms_norm_eps=1e-6,
    )
    folder = write_moe_llava(
        tmp_path / "moe", tiny, mixtral.state_dict(), layers=[0, 1, 2, 3], top_k=2
    )
    with caplog.at_level(logging.INFO):
        imported = import_mixture(folder)
    torch.testing.assert_close(imported(ids).logits, mixtral(ids).logits)
    assert "2 tensors of the image side are not read" in caplog.text
    assert imported.config.router_aux_loss_coef == pytest.approx(0.04)


def test_med_moe_checkpoint_brings_its_meta_expert_and_router_bias(tiny, ids, tmp_path):
    torch.manual_seed(0)
    config = LlamaMoeConfig(
        **tiny,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        meta_expert=True,
        router_bias=True,
        initializer_range=0.2,
    )
    original = LlamaMoeForCausalLM(config).eval()
    for layer in (0, 2):
        original.model.layers[layer].mlp.gate.bias.data.normal_()
    folder = write_moe_llava(tmp_path / "med", tiny, original.state_dict(), layers=[0, 2], top_k=1)
    imported = in_fresh_memory(import_mixture(folder))
    assert torch.equal(imported(ids).logits, original(ids).logits)
    assert imported.config.meta_expert
    assert imported.config.router_bias
    assert not imported.config.norm_topk_prob
    assert imported.config.moe_layer_indices == [0, 2]


def test_dtype_converts_all_but_the_router(tiny, tmp_path):
    make_mixtral(tiny).save_pretrained(tmp_path)
    _, state_dict = imported_state_dict(tmp_path, dtype=torch.bfloat16)
    float32 = {name for name, value in state_dict.items() if value.dtype == torch.float32}
    assert float32 == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)}


def test_missing_expert_is_named(tiny, tmp_path):
    mixtral = make_mixtral(tiny)
    folder = write_moe_llava(
        tmp_path / "moe",
        tiny,
        mixtral.state_dict(),
        layers=[0, 1, 2, 3],
        top_k=2,
        claimed_experts=5,
    )
    with pytest.raises(
        ValueError,
        match=r"missing keys: model\.layers\.0.*deepspeed_experts\.4\.down_proj.* and 7 more",
    ):
        import_mixture(folder)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"use_residual": True}, "use_residual=True"),
        ({"num_experts": [4, 4, 4, 2]}, r"\[4, 4, 4, 2\] experts"),
        ({"top_k_experts": None}, r"lacks \['top_k_experts'\]"),
    ],
)
def test_moe_llava_options_that_llama_moe_lacks_are_refused(moe, message, tiny, tmp_path):
    folder = write_moe_llava(
        tmp_path / "moe",
        tiny,
        make_mixtral(tiny).state_dict(),
        **{"layers": [0, 1, 2, 3], "top_k": 2, **moe},
    )
    with pytest.raises(ValueError, match=message):
        import_mixture(folder)


def test_sliding_window_is_refused(tiny, tmp_path):
    make_mixtral(tiny, sliding_window=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window=4"):
        import_mixture(tmp_path)


def test_moe_llava_on_phi_is_refused_by_name(tiny, tmp_path):
    folder = write_moe_llava(tmp_path / "moe", tiny, {"a": torch.zeros(1)}, layers=[0], top_k=2)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "moe_llava_phi"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"on Phi.*'moe_llava_llama'"):
        import_mixture(folder)


def test_another_architecture_is_refused_with_the_known_ones(tmp_path):
    PhiConfig().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'phi'.*Known: mixtral, moe_llava_llama"):
        import_mixture(tmp_path)

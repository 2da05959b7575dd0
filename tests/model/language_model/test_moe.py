"""Router, experts and losses of one sparse block, against transformers' and plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moellava.model.language_model import (
    LlamaMoeConfig,
    expert_load,
    load_balancing_loss,
    router_penalty,
    router_z_loss,
)
from moellava.model.language_model.moe import (
    LlamaMoeRouter,
    LlamaMoeSparseBlock,
    fastest_experts_forward,
)

IMPLEMENTATIONS = ("eager", "fastest", "grouped_mm", "batched_mm")


def make_block(dtype=torch.float32, implementation="eager", seed=0, **fields):
    config = LlamaMoeConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            **fields,
        }
    )
    config._experts_implementation = implementation
    block = LlamaMoeSparseBlock(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return block.to(dtype)


def hidden(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_formula(block, x):
    """sum_i w_i E_i(x) + E_meta(x), token by token, in float64."""
    x, experts = x.double().reshape(-1, x.shape[-1]), block.experts
    logits = x @ block.gate.weight.double().T
    if block.gate.bias is not None:
        logits = logits + block.gate.bias.double()
    probabilities = logits.softmax(-1)
    rows = []
    for token, p in zip(x, probabilities, strict=True):
        chosen = p.argsort(descending=True)[: block.gate.top_k]
        scale = p[chosen].sum() if block.gate.norm_topk_prob else 1.0
        y = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (experts.gate_up_proj[expert].double() @ token).chunk(2)
            y = y + p[expert] / scale * (experts.down_proj[expert].double() @ (F.silu(gate) * up))
        if block.meta_expert is not None:
            mlp = block.meta_expert
            gate, up = mlp.gate_proj.weight.double() @ token, mlp.up_proj.weight.double() @ token
            y = y + mlp.down_proj.weight.double() @ (F.silu(gate) * up)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "norm_topk_prob": False,
            "num_experts_per_tok": 1,
            "meta_expert": True,
            "router_bias": True,
        },
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    ],
    ids=["mixtral", "med-moe", "narrow"],
)
def test_block_equals_the_plain_formula_in_float64(implementation, fields):
    block, x = make_block(implementation=implementation, **fields), hidden(2, 7, 32)
    torch.testing.assert_close(
        block(x).reshape(-1, 32).double(), plain_formula(block, x), atol=1e-5, rtol=1e-5
    )


def test_meta_expert_is_not_weighted_by_the_router():
    block, x = (
        make_block(meta_expert=True, norm_topk_prob=False, num_experts_per_tok=1),
        hidden(1, 5, 32),
    )
    block.experts.down_proj.data.zero_()
    torch.testing.assert_close(block(x), block.meta_expert(x))


def test_one_expert_equals_the_dense_mlp_in_values_and_gradients():
    block = make_block(num_experts=1, num_experts_per_tok=1)
    mlp = LlamaMLP(LlamaMoeConfig(hidden_size=32, intermediate_size=48))
    gate, up = block.experts.gate_up_proj.data[0].chunk(2)
    for linear, weight in (
        (mlp.gate_proj, gate),
        (mlp.up_proj, up),
        (mlp.down_proj, block.experts.down_proj.data[0]),
    ):
        linear.weight.data.copy_(weight)
    x, x_dense = hidden(2, 5, 32).requires_grad_(), hidden(2, 5, 32).requires_grad_()
    y, y_dense = block(x), mlp(x_dense)
    torch.testing.assert_close(y, y_dense)
    y.square().sum().backward()
    y_dense.square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad, atol=1e-5, rtol=1e-5)
    dense_gate_up = torch.cat([mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad])
    torch.testing.assert_close(
        block.experts.gate_up_proj.grad[0], dense_gate_up, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        block.experts.down_proj.grad[0], mlp.down_proj.weight.grad, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [48, 13], ids=["aligned", "rows that grouped_mm refuses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_implementations_agree_with_eager_in_values_and_gradients(implementation, width, dtype):
    if width == 13 and implementation == "grouped_mm":
        pytest.skip("torch's kernel needs rows of 16 bytes; that is why it is not used blindly")
    results = []
    for name in ("eager", implementation):
        block = make_block(dtype, name, moe_intermediate_size=width)
        x = hidden(3, 5, 32).to(dtype).requires_grad_()
        y = block(x)
        y.float().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for ours, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, eager, atol=tolerance, rtol=tolerance)


def test_batched_mm_is_never_chosen_on_the_cpu(monkeypatch):
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS, "batched_mm", lambda *_: pytest.fail("batched_mm ran")
    )
    for num_tokens in (1, 300):
        make_block(implementation="fastest")(hidden(1, num_tokens, 32))


def test_off_the_cpu_batched_mm_is_bounded_by_the_experts_own_size(monkeypatch):
    used = []
    for name in ("batched_mm", "grouped_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, lambda *_, name=name: used.append(name))
    block = make_block().to("meta")
    for num_tokens in (1, 2, 3, 300):
        index = torch.empty(num_tokens, 2, dtype=torch.long, device="meta")
        fastest_experts_forward(
            block.experts, torch.empty(num_tokens, 32, device="meta"), index, index.float()
        )
    assert used == ["batched_mm", "batched_mm", "grouped_mm", "grouped_mm"]


@pytest.mark.parametrize("implementation", ["eager", "fastest"])
def test_gradients_reach_the_router_and_every_expert_that_got_a_token(implementation):
    block, x = make_block(implementation=implementation), hidden(1, 3, 32)
    _, _, top_k_index = block.gate(x.reshape(-1, 32))
    block(x).square().sum().backward()
    assert block.gate.weight.grad.abs().sum() > 0
    for parameter in (block.experts.gate_up_proj, block.experts.down_proj):
        has_gradient = parameter.grad.flatten(1).abs().sum(1) > 0
        assert has_gradient.tolist() == [bool((top_k_index == e).any()) for e in range(4)]


@settings(deadline=None, max_examples=25)
@given(
    num_tokens=st.integers(1, 20),
    num_experts=st.integers(1, 7),
    data=st.data(),
    norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_routing_weights_are_probabilities_of_distinct_experts(
    num_tokens, num_experts, data, norm, seed
):
    top_k = data.draw(st.integers(1, num_experts))
    block = make_block(
        seed=seed,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm,
        hidden_size=16,
    )
    logits, weights, index = block.gate(hidden(num_tokens, 16, seed=seed))
    assert logits.shape == (num_tokens, num_experts)
    assert all(len(set(row.tolist())) == top_k for row in index)
    chosen = logits.softmax(-1).gather(-1, index)
    assert torch.equal(chosen, logits.softmax(-1).topk(top_k).values)
    expected = chosen / chosen.sum(-1, keepdim=True) if norm else chosen
    torch.testing.assert_close(weights, expected)


def test_a_token_goes_the_same_way_in_any_company():
    block, x = make_block(implementation="fastest"), hidden(6, 4, 32)
    together = block(x)
    for row in range(6):
        torch.testing.assert_close(block(x[row : row + 1])[0], together[row], atol=1e-6, rtol=1e-5)


def test_training_mode_adds_no_noise():
    block, x = make_block(), hidden(1, 5, 32)
    assert torch.equal(block.train()(x), block.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_computes_in_float32_whatever_the_model_computes_in(dtype):
    block = make_block(dtype)
    block.gate.float()
    logits, weights, _ = block.gate(hidden(9, 32).to(dtype))
    assert logits.dtype == weights.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_logits, _, _ = block.gate(hidden(9, 32).to(dtype))
    assert torch.equal(autocast_logits, logits)


def test_frozen_router_gets_no_gradient_even_when_a_trainer_thaws_it():
    block = make_block(router_frozen=True, router_bias=True)
    assert not block.gate.weight.requires_grad
    block.requires_grad_(True)
    block(hidden(1, 5, 32)).sum().backward()
    assert block.gate.weight.grad is None
    assert block.gate.bias.grad is None
    assert block.experts.down_proj.grad is not None


def balanced_logits(num_experts):
    """Each expert is the first choice of one token, and all probabilities are as good as equal."""
    return torch.eye(num_experts) * 1e-4


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_routing_costs_one_under_any_top_k(top_k):
    logits = sum(balanced_logits(4).roll(shift, 0) * (4 - shift) for shift in range(top_k))
    assert load_balancing_loss([logits] * 3, 4, top_k).item() == pytest.approx(1.0, abs=1e-3)


def test_routing_to_one_expert_costs_num_experts_under_top_1():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 7)
    assert load_balancing_loss([logits], 4, 1).item() == pytest.approx(4.0)


def test_loss_by_hand():
    logits = torch.log(torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]]))
    # F = (2/3, 1/3), P = (1.4/3, 1.6/3): 2 * (2/3 * 1.4/3 + 1/3 * 1.6/3)
    assert load_balancing_loss([logits], 2, 1).item() == pytest.approx(2 * (2.8 + 1.6) / 9)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_each_layer_costs_what_transformers_counts_divided_by_top_k(top_k, masked):
    layers = [hidden(12, 5, seed=seed) * 2 for seed in (3, 4, 5)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) if masked else None
    theirs = [load_balancing_loss_func((layer,), 5, top_k, mask) / top_k for layer in layers]
    torch.testing.assert_close(
        load_balancing_loss(layers, 5, top_k, mask), torch.stack(theirs).mean()
    )


def test_two_unbalanced_layers_do_not_cancel_out():
    layers = (torch.tensor([[9.0, 0.0]] * 4), torch.tensor([[0.0, 9.0]] * 4))
    assert load_balancing_loss_func(layers, 2, 1).item() == pytest.approx(1.0)
    assert load_balancing_loss(layers, 2, 1).item() == pytest.approx(2.0, abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    top_k=st.integers(1, 3),
    left=st.booleans(),
)
def test_padding_does_not_count(lengths, top_k, left):
    longest = max(lengths)
    logits = hidden(len(lengths), longest, 3, seed=sum(lengths))
    position = torch.arange(longest)
    mask = torch.stack([position >= longest - n if left else position < n for n in lengths])
    alone = [logits[mask]]
    padded = [logits.reshape(-1, 3)]
    torch.testing.assert_close(
        load_balancing_loss(padded, 3, top_k, mask), load_balancing_loss(alone, 3, top_k)
    )
    torch.testing.assert_close(router_z_loss(padded, mask), router_z_loss(alone))


def test_mask_over_cached_tokens_counts_the_new_ones():
    logits, mask = (
        hidden(2, 4),
        torch.tensor([[0, 1, 1], [1, 1, 0]]),
    )  # one new token per row, one of them padding
    torch.testing.assert_close(
        load_balancing_loss([logits], 4, 2, mask), load_balancing_loss([logits[:1]], 4, 2)
    )


def test_mask_of_another_size_names_both_numbers():
    with pytest.raises(ValueError, match=r"\(3, 4\).*10 tokens"):
        load_balancing_loss([hidden(10, 4)], 4, 2, torch.ones(3, 4))


def test_no_router_logits_is_an_error():
    with pytest.raises(ValueError, match="output_router_logits=True"):
        load_balancing_loss([], 4, 2)


def test_expert_load_is_the_share_of_assignments():
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0], [3.0, 2.0, 0.0], [0.0, 3.0, 2.0]])
    assert expert_load(logits, 3, 2).tolist() == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert expert_load(logits, 3, 1, torch.tensor([[1, 1, 1, 0]])).tolist() == [1.0, 0.0, 0.0]


def test_z_loss_is_the_mean_squared_logsumexp():
    layers = [hidden(6, 4, seed=2), hidden(6, 4, seed=3)]
    expected = sum((layer.exp().sum(-1).log() ** 2).mean() for layer in layers) / 2
    torch.testing.assert_close(router_z_loss(layers), expected)


def test_penalty_weighs_both_losses_and_keeps_its_weight_under_gradient_accumulation():
    config = LlamaMoeConfig(num_experts=4, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    layers, labels = [hidden(6, 4)], torch.tensor([[1, 2, 3], [4, -100, 5]])
    whole = 0.5 * load_balancing_loss(layers, 4, 2) + 0.25 * router_z_loss(layers)
    torch.testing.assert_close(router_penalty(config, layers), whole)
    # 3 of the batch's 12 labels (the first column has no prediction, one is left out)
    torch.testing.assert_close(
        router_penalty(config, layers, labels=labels, num_items_in_batch=12), whole * 3 / 12
    )


def test_gradient_of_the_loss_makes_routing_more_even():
    router = LlamaMoeRouter(LlamaMoeConfig(hidden_size=8, num_attention_heads=4))
    router.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    router.weight.data[0] += 0.3
    x = hidden(64, 8).abs()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        loss = load_balancing_loss([router(x)[0]], 4, 2)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1

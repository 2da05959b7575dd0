from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from moellava.train.log.step_log import StepLog

CPU = torch.device("cpu")


def of_two_processes(tensor):
    """The sum over this process and one that saw the same."""
    return 2 * tensor


@pytest.fixture
def clock():
    with mock.patch("moellava.train.log.step_log.time.perf_counter") as perf_counter:
        perf_counter.return_value = 100.0
        yield perf_counter


def test_tokens_per_second_leave_out_padding_and_time_in_which_nothing_was_trained(clock):
    log = StepLog(SimpleNamespace(text_config=SimpleNamespace(), image_token_id=7))
    ids = torch.zeros(2, 4, dtype=torch.long)
    log.add({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}, None)
    log.add({"input_ids": ids[:1]}, None)  # packed: no mask, no padding
    log.leave_out(8.0)
    clock.return_value = 110.0
    numbers, load = log.flush(CPU, of_two_processes)
    assert numbers["tokens_per_second"] == pytest.approx(2 * (5 + 4) / 2.0)
    assert numbers["memory_mib"] > 10
    assert load is None
    clock.return_value = 111.0
    assert log.flush(CPU, of_two_processes)[0]["tokens_per_second"] == 0  # begun anew


def test_the_balancing_loss_is_the_mean_over_batches_and_processes(clock):
    text_config = SimpleNamespace(num_experts=2, num_experts_per_tok=1, moe_layer_indices=[3])
    log = StepLog(SimpleNamespace(text_config=text_config, image_token_id=7))
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    for aux_loss in (1.0, 2.0):
        outputs = SimpleNamespace(router_logits=[logits], aux_loss=torch.tensor(aux_loss))
        log.add({"input_ids": torch.tensor([[7, 7, 5]])}, outputs)
    clock.return_value = 101.0
    numbers, load = log.flush(CPU, of_two_processes)
    assert numbers["aux_loss"] == pytest.approx(1.5)
    assert load == {"layers": [3], "image": [[0.5, 0.5]], "text": [[1.0, 0.0]]}

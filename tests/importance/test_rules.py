"""No rule is used where it would not be exact."""

import torch
import torch.nn.functional as F
from importance_cases import PositionsFirst, assert_equal, make
from oracles import per_sample_importance, squared_norm
from torch import nn

from mas_embed import estimate_importance


def test_exact_with_a_hook_of_the_user_and_a_patched_layer():
    model, inputs = make("mlp")
    model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    model[2].forward = lambda x: F.linear(x, model[2].weight * 3, model[2].bias)
    assert_equal(
        estimate_importance(model, inputs.split(3)), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )


def test_exact_with_a_global_hook():
    model, inputs = make("mlp")
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, args, output: 2 * output if isinstance(layer, nn.Linear) else None
    )
    try:
        importance = estimate_importance(model, inputs.split(3))
        expected = per_sample_importance(model, inputs.split(1), squared_norm(model))
    finally:
        handle.remove()
    assert_equal(importance, expected)


def test_exact_with_a_patched_class(monkeypatch):
    model, inputs = make("mlp")
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert_equal(
        estimate_importance(model, [inputs]), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )


def test_positions_first_are_detected_if_shapes_change_between_batches():
    model = PositionsFirst().double()
    batches = [torch.randn(n, t, 3, dtype=torch.float64) for n, t in ((1, 1), (4, 1), (5, 5), (1, 5), (3, 5))]
    samples = [sample for batch in batches for sample in batch.split(1)]
    assert_equal(estimate_importance(model, batches), per_sample_importance(model, samples, squared_norm(model)))


def test_does_not_depend_on_the_size_of_blocks_and_chunks(monkeypatch):
    model, inputs = make("linear over positions")
    expected = dict(estimate_importance(model, [inputs]))
    monkeypatch.setattr("mas_embed.importance.rules.memory.CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr("mas_embed.importance.fallback.CHUNK_BYTES", 1)
    assert_equal(estimate_importance(model, [inputs]), expected)
    model, inputs = make("class token")
    assert_equal(
        estimate_importance(model, [inputs]), per_sample_importance(model, inputs.split(1), squared_norm(model))
    )

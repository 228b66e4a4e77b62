import pytest
import torch
from torch import nn

from mas_embed import MAS, SI, Combine, Finetune, Frozen, LwF, Method, UserError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(6, 3).double()


def test_penalties_add_up():
    model, inputs = network()
    parts = [MAS(model, strength=2.0), MAS(model, strength=3.0), LwF(model), LwF(model, distillation="similarity")]
    both = Combine(model, methods=parts)
    both.consolidate([inputs])
    with torch.no_grad():
        model[0].weight.add_(0.1)
    assert both.penalty().item() == pytest.approx(sum(part.penalty().item() for part in parts))
    assert both.penalty().item() > 0
    embeddings = model(inputs)
    values = [part.batch_penalty(inputs, embeddings) for part in parts]
    assert values[:2] == [None, None]
    assert both.batch_penalty(inputs, embeddings).item() == pytest.approx(values[2].item() + values[3].item())
    both.add_penalty_grad()
    combined = model[0].weight.grad.clone()
    model.zero_grad()
    MAS.add_penalty_grad(parts[0])
    torch.testing.assert_close(combined, model[0].weight.grad * 2.5)


def test_without_a_batch_penalty_nothing_is_added():
    model, inputs = network()
    assert Combine(model, methods=[Finetune(model), MAS(model)]).batch_penalty(inputs, model(inputs)) is None


def test_batches_go_through_all_in_order_and_iterators_are_read_once():
    seen = []

    class Doubles(Method):
        def extend_batch(self, inputs, labels):
            return torch.cat([inputs, inputs]), torch.cat([labels, labels])

        def consolidate(self, batches):
            seen.append(len(list(batches)))

    model, inputs = network()
    both = Combine(model, methods=[Doubles(model), Doubles(model)])
    assert len(both.extend_batch(inputs, torch.zeros(6))[0]) == 24
    both.consolidate(iter([inputs, inputs]))
    assert seen == [2, 2]


def test_it_stops_learning_when_one_does():
    model, inputs = network()
    both = Combine(model, methods=[Frozen(model), MAS(model)])
    assert both.is_learning
    both.consolidate([inputs])
    assert not both.is_learning


def test_errors():
    model, _ = network()
    other, _ = network()
    for methods, message in (
        ([MAS(model)], "combine needs at least two methods, got 1"),
        ([MAS(model), MAS(other)], "one and the same model"),
        ([MAS(model), SI(model)], "si must be the first of the methods"),
    ):
        with pytest.raises(UserError, match=message):
            Combine(model, methods=methods)
    Combine(model, methods=[SI(model), MAS(model)])
    with pytest.raises(UserError, match="lacks 0, 1; it is not a state of Combine"):
        Combine(model, methods=[MAS(model), LwF(model)]).load_state_dict({})

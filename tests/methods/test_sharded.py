"""Methods on a model whose parameters are sharded over two processes, against the same model in one piece."""

import copy

import pytest
import torch
from processes import in_two_processes
from small import small_splits
from torch import nn

from mas_embed import MAS, SI, Finetune, UserError, estimate_importance, train_sequence

METHODS = {
    "mas": lambda model: MAS(model, strength=3.0),
    "mas, normalized and decoupled": lambda model: MAS(model, strength=3.0, normalize=True, decoupled=True),
    "si": lambda model: SI(model, strength=3.0),
}


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()  # the last bias has one shard only


def train(model, method, inputs, rank=None):
    """Three steps on the mean squared output, and on half of the inputs in each of two processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for batch in inputs.split(8):
        share = batch if rank is None else batch[4 * rank : 4 * rank + 4]
        model(share).square().mean().backward()
        method.add_penalty_grad()
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()


def protected(make):
    """A model after its first split, and the state of its method."""
    model, inputs = make_model(), torch.randn(2, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method = make(model)
    train(model, method, inputs[0])
    method.consolidate([inputs[0]])
    return model, method, inputs[1]


def found(model, method):
    """What is compared, as whole tensors."""
    penalty = method.penalty()
    penalty.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [penalty.detach(), *gradients, *model.parameters()]
    whole = [value.full_tensor() if hasattr(value, "full_tensor") else value.detach() for value in values]
    return {"values": whole, "state": method.state_dict()}


def shard(rank, folder):
    from torch.distributed.fsdp import fully_shard

    results = {}
    for name, make in METHODS.items():
        model, method, inputs = protected(make)
        state = copy.deepcopy(method.state_dict())
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        sharded = make(model)
        sharded.load_state_dict(state)
        shards = [(anchor.to_local().shape, parameter.to_local().shape) for anchor, parameter in zip(sharded.anchor.values(), model.parameters(), strict=True)]  # fmt: skip
        assert all(one == other for one, other in shards)
        train(model, sharded, inputs, rank)
        results[name] = found(model, sharded)
    with pytest.raises(UserError, match="'0.weight' is sharded over processes.*estimate importance before fully_shard"):
        estimate_importance(model, [inputs])
    with pytest.raises(UserError, match="train_sequence does not train a model that is sharded"):
        train_sequence(model, small_splits(1), method=Finetune(model), loss=lambda *_: None)
    torch.save(results, f"{folder}/{rank}.pt")


def test_a_sharded_model_is_trained_as_a_whole_one(tmp_path):
    in_two_processes(shard, tmp_path)
    for name, make in METHODS.items():
        model, method, inputs = protected(make)
        train(model, method, inputs)
        expected = found(model, method)
        for rank in range(2):
            result = torch.load(tmp_path / f"{rank}.pt")[name]
            torch.testing.assert_close(result["values"], expected["values"], rtol=1e-9, atol=1e-12)
            for key in ("importance", "anchor"):
                torch.testing.assert_close(result["state"][key], expected["state"][key], rtol=1e-9, atol=1e-12)

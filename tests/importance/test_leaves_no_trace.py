import pytest
import torch
from torch import nn

from mas_embed import estimate_importance, explain_coverage


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.PReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        _Recurrent(),
        nn.Linear(4, 2),
    )
    model[1].eval()
    model[6].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, torch.randn(6, 1, 5, 5)


class _Recurrent(nn.Module):
    """An LSTM over nine positions that stores its features and counts its calls."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.features = None
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += 1
        self.features = self.lstm(x.unflatten(1, (9, 3)))[0]
        self.seen = True
        return self.features[:, -1]


def trace(model):
    hooks = {
        (name, kind): len(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    }
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": [tensor.clone() for tensor in model.state_dict().values()],
        "identities": [id(parameter) for parameter in model.parameters()],
        "grads": [parameter.grad.clone() for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks,
        "random": torch.get_rng_state(),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key in ("tensors", "grads"):
            assert all(map(torch.equal, value, after[key])), key
        elif key == "random":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_the_model_is_unchanged(granularity):
    model, inputs = build()
    before = trace(model)
    estimate_importance(model, inputs.split(2), granularity=granularity)
    explain_coverage(model, inputs)
    assert_same(before, trace(model))


def test_the_model_is_unchanged_after_an_exception():
    model, inputs = build()
    before = trace(model)

    def batches():
        yield inputs
        raise KeyError("broken loader")

    with pytest.raises(KeyError, match="broken loader"):
        estimate_importance(model, batches())

    def failing(embeddings, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        estimate_importance(model, [inputs], output=failing)
    assert_same(before, trace(model))


def test_a_shuffling_loader_does_not_change_the_random_state():
    model, inputs = build()
    before = trace(model)
    estimate_importance(model, torch.utils.data.DataLoader(inputs, batch_size=2, shuffle=True))
    assert_same(before, trace(model))


def test_works_under_no_grad():
    model, inputs = build()
    expected = estimate_importance(model, [inputs])
    with torch.no_grad():
        importance = estimate_importance(model, [inputs])
    assert all(torch.equal(importance[name], expected[name]) for name in expected)


def test_works_in_inference_mode():
    model, inputs = build()
    expected = estimate_importance(model, [inputs])
    with torch.inference_mode():
        importance = estimate_importance(model, [inputs.clone()])
    assert all(torch.equal(importance[name], expected[name]) for name in expected)


def test_a_model_with_its_own_train_method_is_restored():
    class Merging(nn.Linear):
        def train(self, mode=True):
            with torch.no_grad():
                if self.training != mode:
                    self.weight.mul_(0.5 if mode else 2.0)
            return super().train(mode)

    model = Merging(3, 2)
    before = model.weight.clone()
    estimate_importance(model, [torch.randn(4, 3)])
    assert torch.equal(model.weight, before)
    assert model.training


def test_an_embedding_with_max_norm_is_unchanged():
    table = nn.Embedding(9, 4, max_norm=0.5)
    before = table.weight.clone()
    estimate_importance(nn.Sequential(table, nn.Linear(4, 2)), [torch.randint(9, (5,))])
    assert torch.equal(table.weight, before)

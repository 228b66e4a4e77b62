import pytest
import torch
from pytorch_metric_learning.losses import ProxyNCALoss, TripletMarginLoss
from torch import nn

from mas_embed import EWC, UserError
from mas_embed.methods import estimate_fisher


def squared_error(embeddings, labels, mined=None):
    return (embeddings[:, 0] - labels).square().mean()


def pairs(embeddings, labels, mined=None):
    distances = (embeddings[:, None] - embeddings).square().sum(2)
    return torch.where(labels[:, None] == labels, distances, torch.exp(-distances)).mean()


def line():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    # F is 2 and 6, the errors 2 and 2, the gradients 2 * 2 * (1, 3) = 4 and 12
    return model, [(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([0.0, 4.0]).double())]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(size, 3).double(), torch.arange(size) % 2) for size in (4, 3)]
    return model, batches


@pytest.mark.parametrize(("fisher", "expected"), [("sample", (16 + 144) / 2), ("batch", 8**2)])
def test_fisher_by_hand(fisher, expected):
    model, batches = line()
    assert estimate_fisher(model, batches, loss=squared_error, fisher=fisher)["weight"].item() == pytest.approx(
        expected
    )


def oracle(model, batches, loss, fisher):
    """One backward pass per sample, in which only the embedding of the sample has a gradient; or one per batch."""
    parameters = list(model.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    num_samples = sum(len(inputs) for inputs, _ in batches)
    for inputs, labels in batches:
        if fisher == "batch":
            gradients = torch.autograd.grad(loss(model(inputs), labels), parameters)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient**2 * len(inputs) / num_samples
            continue
        for index in range(len(inputs)):
            rows = [model(inputs[n : n + 1])[0] for n in range(len(inputs))]
            embeddings = torch.stack([row if n == index else row.detach() for n, row in enumerate(rows)])
            gradients = torch.autograd.grad(len(inputs) * loss(embeddings, labels), parameters)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient**2 / num_samples
    return totals


@pytest.mark.parametrize("fisher", ["sample", "batch"])
@pytest.mark.parametrize("loss", [pairs, squared_error, TripletMarginLoss(margin=1.0)])
def test_fisher_against_a_loop(fisher, loss):
    model, batches = network()
    estimated = estimate_fisher(model, batches, loss=loss, fisher=fisher)
    for value, expected in zip(estimated.values(), oracle(model, batches, loss, fisher), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-14)


def test_a_parameter_without_a_rule_sees_the_loss_of_its_whole_batch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 1.0]).double())

        def forward(self, inputs):
            return inputs * self.scale

    model, (_, batches) = Scaled(), network()
    estimated = estimate_fisher(model, batches, loss=pairs)
    (expected,) = oracle(model, batches, pairs, "sample")
    torch.testing.assert_close(estimated["scale"], expected, rtol=1e-8, atol=1e-14)


def test_a_loss_that_takes_no_pairs_of_a_miner():
    model, batches = network()
    expected = estimate_fisher(model, batches, loss=lambda z, labels, mined: nn.functional.cross_entropy(z, labels))
    for loss in (nn.CrossEntropyLoss(), lambda z, labels: nn.functional.cross_entropy(z, labels)):
        method = EWC(model, loss=loss)
        method.consolidate(batches)
        for name, value in expected.items():
            torch.testing.assert_close(method.importance[name], value, rtol=1e-12, atol=0)


def test_samples_that_cancel_in_a_batch_have_fisher_information():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(0.0)
    batches = [(torch.tensor([[1.0], [1.0]]).double(), torch.tensor([1.0, -1.0]).double())]
    with pytest.warns(UserWarning, match="the loss has no gradient on any batch"):
        assert estimate_fisher(model, batches, loss=squared_error, fisher="batch")["weight"].item() == 0
    assert estimate_fisher(model, batches, loss=squared_error)["weight"].item() == pytest.approx(4)


def test_a_loss_without_a_gradient_gives_a_warning():
    model, batches = network()
    with pytest.warns(UserWarning, match="the loss has no gradient on any sample, so its Fisher information is zero"):
        estimate_fisher(model, batches, loss=lambda embeddings, labels, mined: 0 * embeddings.sum())


def test_the_model_and_its_mode_are_unchanged():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, batches = network()
    state = torch.get_rng_state()
    estimate_fisher(model, batches, loss=pairs)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def consolidated(estimates, **options):
    """Splits that end at given parameters with given Fisher information."""
    model = nn.Linear(1, 2, bias=False).double()
    ewc = EWC(model, loss=squared_error, **options)
    ewc.estimate = lambda batches: {"weight": torch.tensor(fishers.pop(0)).double().unsqueeze(1)}
    fishers = [fisher for _, fisher in estimates]
    for parameters, _ in estimates:
        model.weight.data.copy_(torch.tensor(parameters).unsqueeze(1))
        ewc.consolidate([])
    return model, ewc


def test_separate_anchors_by_hand():
    """F 1 at 0 and 3 at 4 pull as 4 at 3; where no split has any, nothing pulls."""
    _, ewc = consolidated([([0.0, 1.0], [1.0, 0.0]), ([4.0, 2.0], [3.0, 0.0])])
    assert ewc.importance["weight"].flatten().tolist() == [4.0, 0.0]
    assert ewc.anchor["weight"].flatten().tolist() == [3.0, 2.0]


def test_online_by_hand():
    _, ewc = consolidated([([0.0, 1.0], [1.0, 2.0]), ([4.0, 2.0], [3.0, 0.0])], mode="online", decay=0.5)
    assert ewc.importance["weight"].flatten().tolist() == [3.5, 1.0]
    assert ewc.anchor["weight"].flatten().tolist() == [4.0, 2.0]


def test_one_quadratic_is_the_sum_of_those_of_all_splits():
    torch.manual_seed(0)
    ends = [(torch.randn(2).tolist(), torch.rand(2).tolist()) for _ in range(4)]
    model, ewc = consolidated(ends, strength=3.0)
    model.weight.data.normal_()
    penalty = sum(
        3.0 * fisher * (model.weight[index, 0] - anchor) ** 2
        for anchors, fishers in ends
        for index, (anchor, fisher) in enumerate(zip(anchors, fishers, strict=True))
    )
    (expected,) = torch.autograd.grad(penalty, model.weight)
    ewc.add_penalty_grad()
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batch", [torch.zeros(2, 1).double(), (torch.zeros(2, 1).double(),)])
def test_batches_without_labels_are_refused(batch):
    model, _ = line()
    with pytest.raises(UserError, match=r"gradient of the training loss and needs batches of \(inputs, labels\)"):
        EWC(model, loss=squared_error).consolidate([batch])


def test_wrong_options():
    model, _ = line()
    for options, message in (
        ({"loss": ProxyNCALoss(2, 2)}, "ProxyNCALoss has parameters that are trained anew in every split"),
        ({"loss": None}, "pass loss="),
        ({"loss": lambda embeddings: embeddings.sum()}, r"loss\(embeddings, labels\), which <lambda> does not accept"),
        ({"loss": squared_error, "fisher": "exact"}, "fisher must be 'sample' or 'batch', got 'exact'"),
        ({"loss": squared_error, "mode": "both"}, "mode must be 'separate' or 'online', got 'both'"),
        ({"loss": squared_error, "decay": 1.5}, "decay must be from 0 to 1, got 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            EWC(model, **options)

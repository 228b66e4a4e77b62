import numpy as np
import pytest
import torch
from importance_cases import Checkpointed, make
from torch import nn

from mas_embed import UserError, estimate_importance, estimate_local_importance, explain_coverage


def test_invalid_arguments():
    inputs = [torch.randn(2, 6)]
    with pytest.raises(UserError, match="granularity must be 'sample' or 'batch', got 'item'"):
        estimate_importance(nn.Linear(6, 2), inputs, granularity="item")
    with pytest.raises(UserError, match="exponent must be 1"):
        estimate_importance(nn.Linear(6, 2), inputs, exponent=3)
    with pytest.raises(UserError, match="did you mean 'squared_norm'"):
        estimate_importance(nn.Linear(6, 2), inputs, output="squared_nrom")
    with pytest.raises(UserError, match="no trainable parameter"):
        estimate_importance(nn.Linear(6, 2).requires_grad_(False), inputs)
    with pytest.raises(UserError, match=r"shape \[N, D\], got \[2, 2, 3\]"):
        estimate_importance(nn.Linear(6, 3), [torch.randn(2, 2, 6)])
    with pytest.raises(UserError, match="must return a tensor"):
        estimate_importance(nn.LSTM(6, 3), inputs)
    with pytest.raises(UserError, match="NaN"):
        estimate_importance(nn.Linear(6, 3), [torch.full((2, 6), torch.nan)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (torch.zeros(2, 6), "iterable of batches, got one Tensor"),
        ({"x": torch.zeros(2, 6)}, "iterable of batches, got one dict"),
    ],
)
def test_invalid_batches(batches, message):
    with pytest.raises(UserError, match=message):
        estimate_importance(nn.Linear(6, 2), batches)


def test_lazy_and_complex_models_and_empty_batches():
    with pytest.raises(UserError, match=r"'weight' has no shape yet"):
        estimate_importance(nn.LazyLinear(3), [torch.randn(2, 6)])
    with pytest.raises(UserError, match=r"'weight' is complex"):
        estimate_importance(nn.Linear(6, 2, dtype=torch.complex64), [torch.randn(2, 6)])
    with pytest.raises(UserError, match="batch 1: the batch is empty"):
        estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6), torch.randn(0, 6)])


def test_gradients_that_are_not_finite_are_refused():
    model = nn.Linear(6, 3)
    with pytest.raises(UserError, match="gradient of weight, bias is NaN or infinite"):
        estimate_importance(model, [torch.randn(4, 6)], embed=lambda model, batch: 1 + (model(batch) * 0).abs().sqrt())


def test_embeddings_without_a_gradient_are_refused():
    model, inputs = make("mlp")
    with pytest.raises(UserError, match="carry no gradient: the model detaches"):
        estimate_importance(model, [inputs], embed=torch.no_grad()(lambda model, batch: model(batch)))
    with pytest.raises(UserError, match="use_reentrant=False"):
        estimate_importance(Checkpointed(use_reentrant=True).double(), [inputs])


def test_samples_that_depend_on_each_other_are_refused():
    inputs = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(UserError, match="cannot embed samples without the others|changes with the other samples"):
        estimate_importance(model, [inputs])
    with pytest.raises(UserError, match="changes with the other samples of its batch"):
        estimate_importance(
            nn.Linear(4, 3).double(), [inputs], embed=lambda model, batch: model(batch) - model(batch).mean(0)
        )


@pytest.mark.parametrize(
    "couple",
    [lambda y: y + y.mean(0) ** 2, lambda y: y.cumsum(0), lambda y: y.flip(0), lambda y: 300 + y + 3 * y.mean(0)],
    ids=["mean", "causal", "flipped", "small beside a constant"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_samples_that_depend_on_each_other_are_refused_in_every_batch(couple, first):
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 3), torch.randn(7, 6)
    with pytest.raises(UserError, match=f"batch {first}: a sample's embedding changes"):
        estimate_importance(model, [inputs[:1]] * first + [inputs], embed=lambda model, batch: couple(model(batch)))


def test_an_input_modified_in_place_after_its_use_is_refused():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.layer.weight.requires_grad_(False)

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x.zero_()
            return y

    model = Overwriting().double()
    with pytest.raises(UserError, match="modified in place"):
        estimate_importance(model, [torch.randn(4, 6, dtype=torch.float64)])


@pytest.mark.parametrize("granularity", ["sample", "batch"])
@pytest.mark.parametrize("embed", [None, "forward", lambda model, batch: model(batch)])
def test_inputs_that_the_model_refuses_name_the_batch(granularity, embed):
    batches = [torch.randn(2, 6), torch.randn(4, 7)]
    message = r"^batch 1: the model refuses inputs of shape \[4, 7\] \(torch.float32\): mat1 and mat2"
    with pytest.raises(UserError, match=message) as caught:
        estimate_importance(nn.Linear(6, 2), batches, granularity=granularity, embed=embed)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=message) as caught:
        estimate_local_importance(nn.Linear(6, 2), batches, embed=embed)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_inputs_of_another_dtype_or_number_of_channels_are_refused():
    with pytest.raises(UserError, match=r"batch 0: the model refuses inputs of shape \[4, 6\] \(torch.int64\): "):
        estimate_importance(nn.Linear(6, 2), [torch.ones(4, 6, dtype=torch.int64)])
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    with pytest.raises(UserError, match=r"^the model refuses inputs of shape \[2, 1, 4, 4\] .*: Given groups=1"):
        explain_coverage(model, torch.zeros(2, 1, 4, 4))


def test_a_lack_of_memory_is_not_blamed_on_the_inputs():
    def embed(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6)], embed=embed)


def test_samples_that_only_a_whole_batch_can_embed_are_refused():
    model = nn.Sequential(nn.Flatten(0), nn.Linear(12, 8), nn.Unflatten(0, (4, 2)))
    with pytest.raises(
        UserError, match="cannot embed samples without the others of their batch: the model refuses inputs"
    ):
        estimate_importance(model, [torch.randn(4, 3)])


@pytest.mark.parametrize("model", [None, len, {}, "model", nn.Linear])
def test_what_is_no_module_is_refused(model):
    for call in (estimate_importance, estimate_local_importance, explain_coverage):
        with pytest.raises(UserError, match="the model must be a torch.nn.Module, got an object of type"):
            call(model, [torch.randn(2, 6)])


def test_embeddings_that_are_no_floating_point_numbers_are_refused():
    with pytest.raises(UserError, match="embeddings must be real floating-point numbers, got torch.int64"):
        estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6)], embed=lambda model, batch: model(batch).long())


@pytest.mark.parametrize("exponent", [True, 1.0, "1", None, np.int64(1)])
def test_exponents_of_another_type_are_refused(exponent):
    with pytest.raises(UserError, match="exponent must be 1"):
        estimate_importance(nn.Linear(6, 2), [torch.randn(2, 6)], exponent=exponent)

import pytest
import torch

from mas_embed import RunError, UserError
from mas_embed.runtime.forward import check_embed, embed_batch, map_tensors


class ByKeyword(torch.nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class Whole(torch.nn.Module):
    def forward(self, features):
        return features["x"]


class AnyKeyword(torch.nn.Module):
    def forward(self, **inputs):
        assert "labels" not in inputs
        return inputs["x"]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (ByKeyword(), X),
        (ByKeyword(), (X, torch.zeros(2))),
        (ByKeyword(), {"x": X, "labels": torch.zeros(2)}),
        (ByKeyword(), {"x": X, "mask": torch.ones(2, 3), "other": 3}),
        (ByKeyword(), [{"x": X}, "labels"]),
        (Whole(), {"x": X}),
        (AnyKeyword(), {"x": X, "labels": torch.zeros(2)}),
    ],
)
def test_a_batch_reaches_the_model_as_it_takes_it(model, batch):
    assert torch.equal(embed_batch(model, batch), X)


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (X, X),
        ((X, "labels"), X),
        ([X, X + 1], X),
        ({"x": X, "labels": 3}, {"x": X, "labels": 3}),
        (({"x": X}, "labels"), {"x": X}),
        (["one", "two"], ["one", "two"]),
        (("one", "two"), ("one", "two")),
        ((["one", "two"], X), ["one", "two"]),
    ],
)
def test_a_function_gets_the_input_alone(batch, given):
    received = []
    embed_batch(ByKeyword(), batch, lambda model, inputs: received.append(inputs) or X)
    assert received[0] is given or received == [given]


def test_an_unknown_method_of_the_model():
    with pytest.raises(UserError, match="a ByKeyword, has no method 'raw'"):
        embed_batch(ByKeyword(), X, "raw")


def test_tensors_are_mapped_wherever_they_are():
    nest = {"a": [X, "text"], "b": (X, {"c": X}), "d": None}
    mapped = map_tensors(lambda tensor: tensor + 1, nest)
    assert torch.equal(mapped["b"][1]["c"], X + 1)
    assert mapped["a"][1] == "text"
    assert mapped["d"] is None
    assert torch.equal(nest["a"][0], X)


class Raising(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


LINEAR = torch.nn.Linear(6, 2)
CONVOLUTION = torch.nn.Conv2d(3, 2, 1)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            LINEAR,
            torch.zeros(4, 7),
            r"inputs of shape \[4, 7\] \(torch.float32\): mat1 and mat2 shapes cannot be multiplied",
        ),
        (LINEAR, torch.zeros(4, 6, dtype=torch.int64), r"inputs of shape \[4, 6\] \(torch.int64\): "),
        (LINEAR, (torch.zeros(4, 7), torch.zeros(4)), r"inputs of shape \[4, 7\] \(torch.float32\): "),
        (CONVOLUTION, torch.zeros(2, 1, 5, 5), r"inputs of shape \[2, 1, 5, 5\] .*: Given groups=1"),
        (Whole(), {"y": X}, r"inputs of type dict \(y: shape \[2, 3\] \(torch.float32\)\): KeyError 'x'"),
        (LINEAR, [(X, 1)], r"inputs of type tuple \(shape \[2, 3\] \(torch.float32\), type int\): "),
        (LINEAR, (), "a batch is an empty tuple; its first element must be the input"),
        (LINEAR, "text", "inputs of type str: "),
        (LINEAR, None, "inputs of type NoneType: "),
        (Raising(AssertionError()), X, r"inputs of shape \[2, 3\] \(torch.float32\): AssertionError$"),
        (Raising(IndexError("row 3")), X, ": row 3$"),
        (torch.nn.Module(), X, 'missing the required "forward" function'),
    ],
)
def test_inputs_that_the_model_refuses_are_described(model, batch, message):
    with pytest.raises(UserError, match=f"^the model refuses {message}" if message[0] == "i" else message) as caught:
        embed_batch(model, batch)
    assert isinstance(caught.value.__cause__, Exception) or batch == ()
    assert not isinstance(caught.value.__cause__, UserError)


@pytest.mark.parametrize("embed", [lambda model, batch: model(batch), "forward"])
def test_the_same_through_a_function_or_a_method(embed):
    with pytest.raises(UserError, match=r"the model refuses inputs of shape \[4, 7\]"):
        embed_batch(LINEAR, torch.zeros(4, 7), embed)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
        UserError("a sentence"),
        RunError("a sentence"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        embed_batch(Raising(error), X)
    assert caught.value is error


class TwoInputs(torch.nn.Module):
    def forward(self, first, second):
        return first + second


@pytest.mark.parametrize(
    ("batch", "remedy"),
    [
        (
            ((X, X), [0, 1]),
            r"missing 1 required .*; if it takes them one by one, pass embed=lambda model, inputs: model\(",
        ),
        ({"image": X, "label": X}, r"missing 1 required .*; if it takes its inputs in another form, pass embed, as in"),
    ],
)
def test_inputs_of_several_parts_have_a_remedy(batch, remedy):
    with pytest.raises(UserError, match=remedy):
        embed_batch(TwoInputs(), batch)
    assert embed_batch(TwoInputs(), ((X, X), [0, 1]), lambda model, inputs: model(*inputs)).shape == (2, 3)


@pytest.mark.parametrize("embed", [None, "forward", "mean_pooling", lambda model, batch: batch])
def test_names_that_embed_are_accepted(embed):
    check_embed(TwoInputs(), embed)


@pytest.mark.parametrize("embed", ["unnormalized", 3])
def test_names_that_embed_nothing_are_refused(embed):
    with pytest.raises(
        UserError, match=f"a TwoInputs, has no method {embed!r} to embed with; pass the name of a method"
    ):
        check_embed(TwoInputs(), embed)

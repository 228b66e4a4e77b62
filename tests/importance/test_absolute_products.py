"""Compiled sums of absolute products, compared with float64 sums of PyTorch up to a bound of the rounding error."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mas_embed.importance.rules import absolute_products as products
from mas_embed.importance.rules import convolution as convolutions
from mas_embed.importance.rules import linear as linears

compiled = pytest.mark.skipif(not products.has_compiled_products(), reason="the C code was not compiled")
EPS = torch.finfo(torch.float32).eps


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a compiler")
def test_an_installation_with_a_compiler_has_compiled_products():
    assert products.has_compiled_products()


def assert_close(result, expected, bound, num_terms):
    """Checks that the error is at most `num_terms` roundings of the sum of the absolute values of all terms."""
    assert result.dtype == torch.float32
    assert ((result.double() - expected).abs() <= num_terms * EPS * bound).all()


def run_all_widths(monkeypatch, function):
    """Yields the result with vectors of 16, 8 and 4 floats, as far as this processor supports them."""
    widest = products._library().vector_width()
    for width in (16, 8, 4):
        if width <= widest:
            monkeypatch.setattr(products, "_vector_width", lambda _, width=width: width)
            yield function()


convolution_cases = st.fixed_dictionaries(
    {
        "dims": st.integers(1, 3),
        "samples": st.integers(1, 5),
        "channels": st.sampled_from([1, 3, 16, 33]),
        "outputs": st.sampled_from([1, 7, 8, 19]),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "padding": st.sampled_from([0, 1, "same"]),
        "mode": st.sampled_from(["zeros", "circular"]),
        "size": st.integers(5, 7),
        "exponent": st.sampled_from([1, 2]),
        "seed": st.integers(0, 99),
    }
)


@compiled
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolution_cases)
def test_convolutions(case, monkeypatch):
    torch.manual_seed(case["seed"])
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[case["dims"] - 1]
    layer = kind(
        *(case["channels"], case["outputs"], case["kernel"]),
        stride=1 if case["padding"] == "same" else case["stride"],
        dilation=case["dilation"],
        padding=case["padding"],
        padding_mode=case["mode"],
    )
    x = torch.randn(case["samples"], case["channels"], *[case["size"]] * case["dims"])
    delta = torch.randn_like(layer(x))
    monkeypatch.setattr(convolutions, "can_compute", products.can_compute)

    def weight(x, delta, exponent=case["exponent"]):
        return convolutions.convolution(layer, x, delta, exponent, {"weight"})["weight"]

    expected = weight(x.double(), delta.double())
    bound = weight(x.abs().double(), delta.abs().double())
    num_terms = 3 * (delta[0, 0].numel() + case["samples"] + 2)
    for result in run_all_widths(monkeypatch, lambda: weight(x, delta)):
        assert_close(result, expected, bound, num_terms)
    monkeypatch.setattr(convolutions, "can_compute", lambda tensor: False)
    assert_close(weight(x, delta), expected, bound, num_terms)


@compiled
@pytest.mark.parametrize("exponent", [1, 2])
@pytest.mark.parametrize(
    ("samples", "positions", "inputs", "outputs"), [(1, 2, 1, 1), (3, 5, 37, 11), (70, 64, 130, 17)]
)
def test_linear(samples, positions, inputs, outputs, exponent, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), torch.randn(samples, positions, inputs)
    delta = torch.randn(samples, positions, outputs)

    def weight(x, delta):
        return linears.linear(layer, x, delta, exponent, {"weight"})["weight"]

    expected, bound = weight(x.double(), delta.double()), weight(x.abs().double(), delta.abs().double())
    results = list(run_all_widths(monkeypatch, lambda: weight(x, delta)))
    for result in results:
        assert_close(result, expected, bound, 3 * (samples + positions))
    assert_close(
        weight(x.transpose(1, 2).contiguous().transpose(1, 2), delta), expected, bound, 3 * (samples + positions)
    )


@compiled
def test_the_rules_use_the_compiled_code(monkeypatch):
    calls = []
    real = products.sum_absolute_products
    spy = lambda *arguments: calls.append(arguments) or real(*arguments)  # noqa: E731
    monkeypatch.setattr(convolutions, "sum_absolute_products", spy)
    monkeypatch.setattr(linears, "sum_absolute_products", spy)
    layer = nn.Conv2d(16, 8, 3)
    x, delta = torch.randn(2, 16, 5, 5), torch.randn(2, 8, 3, 3)
    convolutions.convolution(layer, x, delta, 1, {"weight"})
    linears.linear(nn.Linear(4, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 3), 1, {"weight"})
    assert len(calls) == 2
    convolutions.convolution(layer, x.double(), delta.double(), 1, {"weight"})
    assert len(calls) == 2


@compiled
def test_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    delta, x = torch.randn(9, 40, 30), torch.randn(9, 30, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(products.sum_absolute_products(delta, x, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@compiled
def test_nan_is_propagated():
    delta, x = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    x[1, 2, 3] = torch.nan
    total = products.sum_absolute_products(delta, x, 1)
    assert total[:, 3].isnan().all() and total[:, :3].eq(8).all()


@compiled
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads which libraries are loaded from /proc")
def test_shares_the_threads_of_pytorch():
    code = (
        "import torch; from mas_embed.importance.rules import absolute_products as products; torch.ones(2).sum()\n"
        "before = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line}\n"
        "assert products.has_compiled_products()\n"
        "after = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line}\n"
        "assert before == after, after - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_installation_without_compiled_products(monkeypatch, tmp_path):
    products._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        assert not products.has_compiled_products()
        assert not products.can_compute(torch.zeros(1))
    finally:
        monkeypatch.undo()
        products._library.cache_clear()


def test_a_library_that_cannot_be_loaded_is_not_used(monkeypatch, tmp_path):
    broken = tmp_path / "_absolute_products.so"
    broken.write_bytes(b"no library")
    products._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.util.spec_from_file_location(name, broken))
    try:
        assert not products.has_compiled_products()
    finally:
        monkeypatch.undo()
        products._library.cache_clear()

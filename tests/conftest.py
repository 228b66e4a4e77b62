"""Fixtures that tests of several rooms share."""

import signal

import pytest
import torch

# A shell starts programs in the background with Ctrl-C ignored, which they and their child processes would keep
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def blank_pictures(monkeypatch):
    """Leaves the pictures of reports empty: drawing them takes longer than a tiny experiment."""
    monkeypatch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
    monkeypatch.setattr("mas_embed.report.drawing.svg_of", lambda figure: '<svg width="1"></svg>')


@pytest.fixture(scope="session", autouse=True)
def trainings_on_the_cpu():
    """Trains on the CPU even where there is a GPU, except in tests with the marker `gpu`."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(autouse=True)
def device_of_trainings(request, monkeypatch):
    """Lets a test with the marker `gpu` train on the GPU; accelerate remembers the first device of a process."""
    if not torch.cuda.is_available():
        yield
        return
    from accelerate.state import AcceleratorState

    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

"""Fixtures that tests of several rooms share."""

import pytest
import torch


@pytest.fixture
def blank_pictures(monkeypatch):
    """Leaves the pictures of reports empty: drawing them takes longer than a tiny experiment."""
    monkeypatch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")


@pytest.fixture(autouse=True)
def device_of_trainings(request, monkeypatch):
    """Trains on the CPU even where there is a GPU, except in tests with the marker `gpu`."""
    if not torch.cuda.is_available():
        yield
        return
    from accelerate.state import AcceleratorState

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # which remembers the first device
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

"""Fixtures that tests of several rooms share."""

import pytest


@pytest.fixture
def blank_pictures(monkeypatch):
    """Leaves the pictures of reports empty: drawing them takes longer than a tiny experiment."""
    monkeypatch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")

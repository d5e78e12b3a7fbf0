"""Fixtures of the tests of speeds."""

import pytest

from tests.helpers.clock import set_clock


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Shapes decide how long encoders take."""
    set_clock(monkeypatch)

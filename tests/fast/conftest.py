"""Fixtures of the tests of sped-up models."""

import itertools

import pytest
import torch

from hf_disparse import speed_up
from tests.helpers.speeding import MODULE, sparse_model


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gains(monkeypatch):
    """Each call of `speed_up` measures a model three times as fast afterwards."""
    seconds = itertools.cycle([[3.0, 3.0], [1.0, 1.0]])
    monkeypatch.setattr(MODULE, "_seconds", lambda model: next(seconds))


@pytest.fixture
def pair(gains):
    """A sped-up model and the same one as it was."""
    return speed_up(sparse_model()), sparse_model()

"""What tests of every folder share."""

import gc
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.tiny")


def pytest_collection_finish() -> None:
    """Four thousand collected tests are not looked through again at every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def thawed():
    """The garbage collector sees everything, as in a program that has frozen nothing."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """Runs the test on one thread of torch's: runs that are compared bit for bit must add in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TRAINING = ("core", "data", "evaluate", "faults", "golden", "model", "sample", "train", "truth")
"""Folders whose tests train hundreds of times and look at no figure."""


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """The reports that runs of those tests write are whole but for their figures, whose drawing takes half a second."""
    if request.path.relative_to(Path(__file__).parent).parts[0] in TRAINING:
        from tests.tiny import without_figures

        without_figures(monkeypatch.setattr)
    yield

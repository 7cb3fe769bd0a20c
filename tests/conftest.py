"""What tests of every folder share."""

import gc

import pytest
import torch

pytest.register_assert_rewrite("tests.tiny")


def pytest_collection_finish() -> None:
    """Every stage of a run collects garbage before its first step: not among all the tests, which takes a second.

    What is made from here on is collected as ever. A run's own freezing, which would end this one, is left out in
    test processes; those that they start have it.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


@pytest.fixture
def one_thread():
    """Runs the test on one thread of torch's: runs that are compared bit for bit must add in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

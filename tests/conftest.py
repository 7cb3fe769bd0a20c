"""What tests of every folder share."""

import gc

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

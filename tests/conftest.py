"""What tests of every folder share."""

import pytest
import torch

pytest.register_assert_rewrite("tests.tiny")


@pytest.fixture
def one_thread():
    """Runs the test on one thread of torch's: runs that are compared bit for bit must add in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""The kernel as its users get it: the one that kernel-builder's shells name in LOCAL_KERNELS, or the build beside."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

sys.path.append(str(ROOT))  # for dit_block


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: what kernel-builder's continuous integration runs")


@pytest.fixture(scope="session")
def build():
    """A folder for get_local_kernel; LOCAL_KERNELS is "repository=folder"."""
    named = os.environ.get("LOCAL_KERNELS", "")
    return Path(named.partition("=")[2]) if named else ROOT


@pytest.fixture(scope="session")
def kernel(build):
    from kernels import get_local_kernel

    return get_local_kernel(build)


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

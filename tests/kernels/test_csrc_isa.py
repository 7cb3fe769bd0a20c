"""Every instruction set that this machine has gives the same results, and ST_FAST_ISA chooses among them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from csrc_cases import cases, error, evaluate

from st_fast import kernels
from st_fast.kernels import native
from tests import warm

CHILD = """
import sys
import numpy as np
import torch
from csrc_cases import cases, evaluate
from st_fast import kernels
torch.set_num_threads(1)
assert kernels.native.isa() == sys.argv[2], kernels.native.isa()
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in cases():
        for name, value in evaluate(case, kernels, dtype).items():
            found[f"{dtype} {case.name} {name}"] = value.float().numpy()
torch.manual_seed(0)
lists = [[torch.rand(1003)] for _ in range(5)]
norm = kernels.ops.grad_norm(lists[1])
lr = torch.tensor(1e-3)
kernels.ops.adamw_ema_(*lists, [], torch.zeros(()), norm, lr, 0.9, 0.99, 1e-8, 0.1, 0.99, 0.5)
found |= {f"optimiser {i}": tensors[0].numpy() for i, tensors in enumerate(lists)}
found["norm"] = norm.numpy()
for path in ("linear", "cosine"):
    moments, ordinals, t = torch.randn(5, 8, 9, 33).half(), torch.arange(5) * 2**35, torch.rand(5)
    made = kernels.noisy_latents(moments, ordinals, t, 2**63 + 9, 0.3, path)
    found |= {f"latents {path} {i}": value.numpy() for i, value in enumerate(made)}
np.savez(sys.argv[1], **found)
"""

pytestmark = pytest.mark.skipif(not native.available(), reason="csrc is not built")


def run_child(isa: str, target: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"ST_FAST_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    return warm.run("-c", CHILD, target, isa, env=env)


def supported() -> list[str]:
    """What this machine has besides the baseline."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    target = tmp_path_factory.mktemp("isa") / "baseline.npz"
    done = run_child("baseline", target)
    assert done.returncode == 0, done.stderr
    return dict(np.load(target))


@pytest.fixture(scope="module", params=supported())
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    target = tmp_path_factory.mktemp("isa") / "found.npz"
    done = run_child(request.param, target)
    assert done.returncode == 0, done.stderr
    return dict(np.load(target))


def test_instruction_sets_agree(found: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> None:
    assert found.keys() == baseline.keys()
    for name, truth in baseline.items():
        allowed = {"torch.bfloat16": 2e-2, "torch.float16": 3e-3}.get(name.split()[0], 5e-6)
        assert error(torch.from_numpy(found[name]), torch.from_numpy(truth)) <= allowed, name


def test_optimiser_latents_and_extrapolation_agree_bit_for_bit(
    found: dict[str, np.ndarray], baseline: dict[str, np.ndarray]
) -> None:
    """One rounding an operation: nothing may depend on the vector's width or on fused multiply-adds."""
    for name, truth in baseline.items():
        if name.startswith(("optimiser", "latents")) or "cfg_extrapolate" in name:
            assert np.array_equal(found[name], truth), name


def test_baseline_is_as_exact_as_the_one_in_use(baseline: dict[str, np.ndarray]) -> None:
    for case in cases():
        for name, value in evaluate(case, kernels, torch.float32).items():
            other = torch.from_numpy(baseline[f"torch.float32 {case.name} {name}"])
            assert error(other, value) <= 5e-6, (case.name, name)


def test_unknown_instruction_set_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    done = run_child("sse9", tmp_path / "none.npz")
    assert done.returncode != 0
    assert "ST_FAST_ISA = 'sse9'" in done.stderr

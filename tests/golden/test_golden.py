"""The numbers are what they were: a change that claims no effect on them shows none."""

from __future__ import annotations

import json

import pytest
import torch

from tests.golden import cpu_float32 as golden

KEPT = json.loads(golden.FILE.read_text())["losses"]


@pytest.mark.parametrize("name", golden.VARIANTS)
def test_losses_on_the_cpu_in_float32_are_the_golden_ones(name, tmp_path):
    torch.set_num_threads(1)
    found = golden.losses(tmp_path, golden.VARIANTS[name])
    assert len(found) == len(KEPT[name]) == 20
    for step, (ours, theirs) in enumerate(zip(found, KEPT[name], strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=golden.TOLERANCE, abs=1e-6), f"step {step} of {golden.KEYS}"


def test_fused_and_reference_kernels_have_the_same_golden_losses():
    for ours, theirs in zip(KEPT["tiny"], KEPT["reference kernels"], strict=True):
        assert ours == pytest.approx(theirs, rel=golden.TOLERANCE, abs=1e-6)

"""Gradients over ranks: the sum of all micro-batches', sent while the backward runs, once a step."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.faults.reduction_child import Model


def run(folder: Path, travel: str, count: int = 2) -> list[dict]:
    """What each rank saw."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRAVEL": travel}
    children = [
        warm.start(
            "-m", "tests.faults.reduction_child", folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [child.communicate(120) for child in children]
    assert [child.returncode for child in children] == [0] * count, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def expected(step: int) -> list[torch.Tensor]:
    """The gradients of all ranks' micro-batches in one process."""
    model = Model()
    for rank in range(2):
        for x in torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank)):
            model(x, skip=rank == 1 and step == 1).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize(("travel", "tolerance"), [("own", 1e-6), ("bf16", 1e-2)])
def test_the_sum_is_right_overlaps_the_backward_and_is_sent_once_a_step(travel, tolerance, tmp_path):
    """Also where one rank lacks a layer's gradient for a step, and where no rank has one."""
    ranks = run(tmp_path, travel)
    assert ranks[0]["gradients"] == ranks[1]["gradients"]  # bit for bit
    for step in range(2):
        for ours, theirs in zip(ranks[0]["gradients"][step], expected(step), strict=True):
            scale = max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(torch.tensor(ours).view_as(theirs), theirs, rtol=0, atol=tolerance * scale)
    for rank in ranks:
        buckets, events = rank["buckets"], rank["events"]
        assert buckets >= 3 and events.count("send") == 2 * buckets
        for at in [i for i, event in enumerate(events) if event == "last"]:
            step = events[at : events.index("finish", at)]
            # The first micro-batch sends nothing; in the last, buckets leave before the backward's last gradient.
            assert step.count("send") == buckets and "send" in step[: step.index("first layer")]

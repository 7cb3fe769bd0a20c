"""The loaders' benchmark: every loader reads the same records, and the rows of a shape are measured together."""

import torch

from bench import loading
from bench.machine import Suite
from bench.measure import Effort


def test_rows_of_a_shape_are_measured_once_and_the_resident_loader_only_warm(monkeypatch):
    for name, value in (("BATCH", 8), ("BATCHES", 2), ("FILES", 16), ("STEP_SECONDS", 0.01)):
        monkeypatch.setattr(loading, name, value)
    monkeypatch.setattr(loading, "dali_missing", lambda: "not needed here")
    monkeypatch.setattr(Suite, "effort", Effort(rounds=1, seconds=1, least=1, warmup=0))
    interleaved, calls = loading.interleave, []
    monkeypatch.setattr(loading, "interleave", lambda *given: calls.append(given) or interleaved(*given))
    rows = {key: task() for key, task in loading.loaders(Suite(torch.device("cpu"), None, small=True))}
    assert list(rows) == [
        "8×32×32 cold torch", "8×32×32 cold per file",
        "8×32×32 warm torch", "8×32×32 warm resident", "8×32×32 warm per file",
    ]  # fmt: skip
    assert len(calls) == 2
    for row in rows.values():
        assert row["samples/s"] > 0 and len(row["spread_ms"]) == 5
        assert ("waited" in row) == (row["cache"] == "warm" and row["loader"] != "per file")
    assert rows["8×32×32 warm per file"]["times per file"] == 1.0

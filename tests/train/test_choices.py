"""What a trial chose at a run's start is kept with its checkpoints: whoever goes on computes the same bits."""

from __future__ import annotations

import pytest
import torch

from st_fast.core import checkpoint
from st_fast.model import timed
from st_fast.recipe import load
from st_fast.train.run import run
from st_fast.train.step import Step
from tests import tiny
from tests.faults.ranks import wait_for

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trial(monkeypatch):
    """Has the CPU's op taken for one with a kernel, and its trial end as the test says."""
    monkeypatch.setattr(timed, "has_kernel", lambda op, kind: True)
    return lambda fused: monkeypatch.setattr(timed, "_tried", lambda *a: timed.Verdict(speedup=1.5, sure=fused))


def state(out):
    found = checkpoint.latest(out / "transcend" / "checkpoints", pytest.fail)
    return found.meta["kernels"], {f"{g}/{k}": t for g, ts in found.groups.items() for k, t in ts.items()}


def test_a_resumed_run_keeps_the_way_it_began_with_whatever_a_trial_would_say(tmp_path, trial, capsys, monkeypatch):
    data = tiny.write_data(tmp_path / "data")

    def recipe(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return load(tiny.write_recipe(tmp_path / name / "tiny.toml", data, tmp_path / name / "out"))

    trial(True)
    run(recipe("whole"))
    trial(False)
    run(recipe("plain"))
    called = Step.losses

    def dies(this, batch, target):
        if (this.heartbeat.stage, this.heartbeat.step) == ("align", 7):
            raise RuntimeError("is killed here")
        return called(this, batch, target)

    trial(True)
    with monkeypatch.context() as patched:
        patched.setattr(Step, "losses", dies)
        with pytest.raises(RuntimeError, match="is killed here"):
            run(recipe("cut"))
    trial(False)
    saved = tmp_path / "cut" / "out" / "align" / "checkpoints"
    wait_for(lambda: any(saved.glob("*/manifest.json")))  # a thread writes it
    capsys.readouterr()
    run(recipe("cut"))
    assert "kernels: gelu_mlp fused, as before" in capsys.readouterr().out
    (whole, bits), (plain, others), (cut, resumed) = (
        state(tmp_path / name / "out") for name in ("whole", "plain", "cut")
    )
    assert (whole, plain, cut) == ({"gelu_mlp": "fused"}, {"gelu_mlp": "reference"}, {"gelu_mlp": "fused"})
    assert bits.keys() == resumed.keys() and all(torch.equal(bits[key], resumed[key]) for key in bits)
    assert not all(torch.equal(bits[key], others[key]) for key in bits)  # or the line above would show nothing

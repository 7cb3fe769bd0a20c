"""The doctor: what it says is what the trainer would do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from st_fast import kernels
from st_fast.model.attention import BACKENDS, choose
from st_fast.train import doctor, log
from tests import tiny

CPU = torch.device("cpu")


def test_the_table_has_every_section_and_json_has_the_same(capsys):
    doctor.main([])
    printed = capsys.readouterr().out
    doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "devices", "kernels on cpu", "attention on cpu", "loaders", "the step"]
    for title, rows in found.items():
        assert f"\n{title}\n" in f"\n{printed}" and rows
        for what, state in rows.items():
            assert state and any(line.split() == [*what.split(), *state.split()] for line in printed.splitlines())
    assert found["versions"]["torch"].startswith(torch.__version__)
    for name in ("DALI", "flash-attn", "xformers", "apex", "torchao", "diffusers", "transformers", "wandb"):
        assert name in found["versions"]
    assert "kernels (Hugging Face)" in found["versions"] and "nsys" in found["the step"]


def test_what_auto_takes_is_what_a_run_takes():
    rows, table = doctor.implementations(CPU), kernels.select({}, CPU)
    assert rows["bias_gradients"].startswith("fused" if table.bias_gradients else "reference")
    for op in kernels.TABLE:
        serving = getattr(table, op)
        assert rows[op].startswith("reference" if serving is getattr(kernels.reference, op) else "fused"), op
    said = doctor.attention(CPU)
    for head in doctor.HEAD_SIZES:
        (taken,) = [name for name in BACKENDS if "taken by auto" in said[f"{name}, head size {head}"]]
        assert choose("auto", CPU, torch.float32, head, lambda text: None) is BACKENDS[taken].attend
        assert said[f"cudnn, head size {head}"] == "runs on cuda only"


def test_a_backend_that_computes_wrongly_is_not_called_right(monkeypatch):
    wrong = SimpleNamespace(attend=lambda q, k, v: q * k * v, refusal=lambda device, head: None)
    monkeypatch.setitem(doctor.BACKENDS, "sdpa", wrong)
    said = doctor.attention(CPU)["sdpa, head size 64"]
    assert "output is off by" in said and "auto" not in said


def test_a_gpu_is_named_with_memory_capability_and_whether_it_multiplies_fp8(monkeypatch):
    gpus = [
        SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0),
        SimpleNamespace(name="NVIDIA A100", total_memory=40 * 2**30, major=8, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    rows = doctor.devices()
    assert rows["cuda:0: NVIDIA H200"] == "140.0 GiB, compute capability 9.0, fp8"
    assert rows["cuda:1: NVIDIA A100"].endswith("compute capability 8.0, no fp8 (needs 8.9)")


def test_rates_are_measured_only_when_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(log, "matmul_rate", lambda device, dtype: 1.7e11)
    monkeypatch.setattr(doctor, "findings", lambda measure: {"measured": doctor.rates(CPU)} if measure else {"": {}})
    doctor.main(["--measure", "--json"])
    found = json.loads(capsys.readouterr().out)["measured"]
    assert found["matrix product, float32"] == "170 GFLOP/s"
    assert float(found["copy, read + written"].split()[0]) > 0


def test_the_plan_is_reached_through_the_doctor(capsys):
    doctor.main(["--plan", str(tiny.ROOT / "recipes" / "sit_xl.toml"), "--images-per-s", "512"])
    assert "one GPU 512 images/s (as given)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--plan", "--help"])
    assert ended.value.code == 0 and "--network" in capsys.readouterr().out

"""A checkpoint that arrives while a command reads one: what is written names the model that was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from st_fast.convert import __main__ as convert
from st_fast.core import checkpoint
from st_fast.core.checkpoint import store
from st_fast.evaluate import __main__ as evaluate
from st_fast.evaluate.probe import together
from st_fast.evaluate.probe.__main__ import main as probe
from st_fast.evaluate.probe.examine import Findings
from st_fast.evaluate.probe.measures import Estimate
from st_fast.model import stored
from st_fast.model.vae import tensors_hash
from st_fast.sample import __main__ as sample
from tests.evaluate.test_evaluate_command import real_images
from tests.sample.tiny_run import make_run


@pytest.fixture(params=["the manifest", "the tensors", "all"])
def run(request: Any, tmp_path: Path, monkeypatch: Any) -> Path:
    """A run at step 10 whose step 20, of other weights, arrives when that much of step 10 was read."""
    found, arrived = make_run(tmp_path), []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def arrive() -> None:
        if not arrived:
            arrived.append(20)
            make_run(tmp_path, seed=1, step=20)

    def then_arrives(module: Any, name: str) -> None:
        real = getattr(module, name)

        def function(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            arrive()
            return result

        monkeypatch.setattr(module, name, function)

    if request.param == "all":
        for name in ("read_weights", "from_checkpoint"):
            then_arrives(stored, name)
    else:
        then_arrives(store, {"the manifest": "read_manifest", "the tensors": "load"}[request.param])
    return found


def ema(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(run / "plain" / "checkpoints" / f"{step:08d}").groups["ema"])


def test_samples_and_their_scores_name_the_model_that_was_read(run: Path, tmp_path: Path) -> None:
    real_images(tmp_path / "data")
    evaluate.main([str(run), "-n", "70"])
    folder = run / "plain" / "samples" / "70-heun3-cfg2"
    drawn, scored = (json.loads((folder / name).read_text()) for name in ("sample.json", "metrics.json"))
    assert ema(run, 20), "it has arrived"
    assert len(drawn.pop("samples_sha256")) == 64
    assert drawn["step"] == scored["step"] == 10 and scored["samples"] == drawn
    assert drawn["model_sha256"] == tensors_hash(ema(run, 10)) != tensors_hash(ema(run, 20))
    sample.main([str(run), "-n", "70", "--npz"])
    later = [json.loads(path.read_text()) for path in folder.parent.glob("70-*-step20-*/sample.json")]
    assert [one["model_sha256"] for one in later] == [tensors_hash(ema(run, 20))]


def test_a_probe_names_the_model_that_was_read(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    read: list[Any] = []

    def examined(model: Any, *rest: Any) -> Findings:
        read.append(model)
        half = Estimate(0.5, np.array([0.5, -0.5]))
        two, tokens = [[half, half]], torch.zeros(1, 16, 4).numpy()
        return Findings([0, 1], two, two, two, [[tokens, tokens]], [0.0])

    real_images(tmp_path / "data")
    monkeypatch.setattr(together, "examine", examined)
    monkeypatch.setattr(together, "draw_all", lambda *arguments: [])
    probe([str(run), "--times", "0.5"])
    [told] = json.loads((run / "probe" / "probe.json").read_text())["models"]
    assert ema(run, 20), "it has arrived"
    assert told["step"] == 10 and told["sha256"] == tensors_hash(dict(read[0].state_dict())) == tensors_hash(
        ema(run, 10)
    )


def test_a_published_folder_names_the_model_that_was_read(run: Path, tmp_path: Path) -> None:
    convert.main([str(run), str(tmp_path / "hf"), "--to", "huggingface"])
    assert ema(run, 20), "it has arrived"
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors_hash(weights) == tensors_hash(ema(run, 10))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["step"] == 10
    assert "step 10." in (tmp_path / "hf" / "README.md").read_text()

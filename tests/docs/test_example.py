"""The example for library users runs as it stands, fits on a page, and computes what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example.py"


@pytest.fixture(scope="module")
def names() -> dict:
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return runpy.run_path(str(EXAMPLE))


def test_it_is_a_page_of_thirty_lines() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines[4:] if line.strip() and not line.startswith("#")]
    assert len(code) <= 30


def test_its_losses_are_those_of_the_definitions(names: dict) -> None:
    double = {k: names[k].detach().double().numpy() for k in ("hidden", "conditional", "unconditional")}
    f = double["unconditional"] + 30.0 * (double["conditional"] - double["unconditional"])
    q = double["hidden"]
    cosines = (q * f).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(f, axis=-1)
    assert float(names["aux"].detach()) == pytest.approx(-cosines.mean(), abs=1e-5)
    error = (names["prediction"] - names["velocity"]).detach().double().numpy() ** 2
    assert float(names["denoise"].detach()) == pytest.approx(error.mean(), rel=1e-5)


def test_its_step_lowers_the_loss_it_took(names: dict) -> None:
    with torch.no_grad():
        prediction, _ = names["student"](names["x_t"], names["t"], names["labels"])
        after = names["flow"].denoising_loss(prediction, names["velocity"]).mean()
    assert after < names["denoise"]


def test_its_samples_do_not_depend_on_the_batch(names: dict) -> None:
    latents = names["latents"]
    assert latents.shape == (10, 4, 8, 8) and torch.isfinite(latents).all()
    draw = names["balanced"](0, 3, 2, 10, names["device"])
    alone = names["sample"](names["student"], draw, names["settings"], "linear")
    torch.testing.assert_close(alone, latents[3:5], atol=1e-5, rtol=1e-5)


def test_its_folder_holds_the_model(names: dict) -> None:
    again, student = names["again"].state_dict(), names["student"].state_dict()
    assert again.keys() == student.keys() and all(torch.equal(again[key], student[key]) for key in student)

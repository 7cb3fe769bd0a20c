"""Pictures and scores cost no step: what is missing is told before, what fails is a line, what was cut off is made."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from st_fast.core import checkpoint, signals
from st_fast.core.errors import Interrupted, UserError
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.evaluate import classifier
from st_fast.model import SiT
from st_fast.recipe import load
from st_fast.train import examiner
from st_fast.train.examiner import Examiner
from st_fast.train.run import run
from tests import pixels, tiny

OPTIONS = ("--sample.every=3", "--evaluate.every=4", "--evaluate.num=70", "--run.save_every=100", "--run.log_every=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return pixels.write_data(tmp_path_factory.mktemp("pixels") / "data")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("st_fast.train.run.matmul_rate", lambda device, dtype: 1e11)
    yield
    signals._let_go()


def trained(home: Path, data: Path, *options: str) -> Path:
    """The run folder of the first stage of the recipe of pixels."""
    text = pixels.RECIPE.format(data=data)
    (home / "one.toml").write_text(text[: text.rindex("[[stage]]")])
    run(load(home / "one.toml", [f"--run.out={home / 'out'}", *OPTIONS, *options]))
    return home / "out"


def state(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(out / "align" / "checkpoints", pytest.fail)
    assert found
    return {f"{group}/{key}": tensor for group, tensors in found.groups.items() for key, tensor in tensors.items()}


def records(out: Path) -> list[tuple[str, int]]:
    """What was drawn and scored, and at which steps."""
    return sorted((kind, record["step"]) for kind in ("sample", "eval") for record in tiny.records(out, kind))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An undisturbed run with pictures and scores."""
    return trained(tmp_path_factory.mktemp("whole"), data, "--evaluate.classifier=true")


@pytest.mark.parametrize("work", ["drawing", "training the classifier", "writing"])
def test_a_signal_anywhere_in_it_saves_and_the_resume_makes_what_is_missing(work, whole, data, tmp_path, monkeypatch):
    def cut_off(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def struck(*arguments: object, **options: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
            return real(*arguments, **options)

        patch.setattr(owner, name, struck)

    own = pixels.write_data(tmp_path / "data") if work == "training the classifier" else data
    with monkeypatch.context() as patch:
        if work == "drawing":
            forward = SiT.forward
            patch.setattr(SiT, "forward", lambda self, *given: strike(self) or forward(self, *given))

            def strike(network: SiT) -> None:
                if not network.training:
                    os.kill(os.getpid(), signal.SIGTERM)

        else:
            cut_off(*((classifier, "_augmented") if work == "training the classifier" else (examiner, "sheet")))
        with pytest.raises(Interrupted, match=r"^SIGTERM: saved align at step (3|4);"):
            trained(tmp_path, own, "--evaluate.classifier=true")
    cut = tmp_path / "out"
    assert not [path for path in (cut / "align").rglob("*.png") if f"sample/{int(path.stem)}" in str(records(cut))]
    assert trained(tmp_path, own, "--evaluate.classifier=true") == cut
    assert records(cut) == records(whole) and {kind for kind, _ in records(cut)} == {"sample", "eval"}
    ours, theirs = state(cut), state(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for path in (whole / "align" / "samples").iterdir():
        assert (cut / "align" / "samples" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("error", [UserError("vae: gone"), MemoryError()])
def test_what_fails_is_one_line_a_save_precedes_it_and_training_goes_on(
    error, data, whole, tmp_path, monkeypatch, capsys
):
    there = []

    def fail(self, *arguments):
        there.append(tiny.records(tmp_path / "out", "save")[-1]["step"])
        raise error

    monkeypatch.setattr(Examiner, "images", fail)
    out = trained(tmp_path, data, "--evaluate.classifier=true")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("; training goes on")]
    assert [line.split(":")[0] for line in lines] == [f"align {step}" for step in (3, 4, 6, 8, 8)]
    assert there == [3, 4, 6, 8, 8] and records(out) == []
    ours, theirs = state(out), state(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_decoder_that_is_not_there_is_told_before_the_first_step_and_never_stops_a_run_that_has_begun(
    tmp_path, capsys
):
    data = pixels.write_data(tmp_path / "data")
    manifest = read_manifest(data)
    write_manifest(data, type(manifest)(**vars(manifest) | {"vae": type(manifest.vae)("no/such/folder/of/a/vae")}))
    with pytest.raises(UserError, match=r"--sample.vae names another folder, or --sample.num=0 for no pictures"):
        trained(tmp_path, data)
    assert not (tmp_path / "out" / "align").exists()
    trained(tmp_path, data, "--sample.num=0", "--stage.align.steps=4")
    out = trained(tmp_path, data)
    assert "training goes on without" in capsys.readouterr().out and records(out) == []
    trained(tmp_path, data, "--sample.vae=pixels-gray", "--stage.align.steps=9")
    assert records(out) == [("sample", 9)]

"""Models without a run are drawn from as they are: images are those of a plain loop, and of the run they came from."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.convert.folders import write_diffusers
from st_fast.core.checkpoint.store import digest_of
from st_fast.core.errors import UserError
from st_fast.core.random import Purpose, normal
from st_fast.data.manifest import read_manifest, write_manifest
from st_fast.model import MMDiT, SiT
from st_fast.model.formats import LoadedState
from st_fast.model.stored import ModelSource, read_model
from st_fast.model.text_encoders import load_text_encoder
from st_fast.recipe.schema import Model
from st_fast.sample import __main__ as sample
from st_fast.sample.source import place_in_run
from tests import foreign, tiny_text
from tests.model import test_formats
from tests.sample.test_prompts import Encoder
from tests.sample.test_prompts import encoder as encoder
from tests.sample.test_prompts import run as run
from tests.sample.tiny_run import make_run

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

SCALE, SHIFT, STEPS, SEED = 0.37, 0.21, 2, 5
CLASSES, HEADS, CHANNELS = test_formats.CLASSES, test_formats.HEADS, test_formats.CHANNELS
TOLD = ("--heads", str(HEADS), "--num-classes", str(CLASSES))
CONFIG = Model(
    depth=test_formats.DEPTH, width=test_formats.WIDTH, heads=HEADS, patch=test_formats.PATCH, channels=CHANNELS,
    latent_size=test_formats.SIDE * test_formats.PATCH, num_classes=CLASSES,
)  # fmt: skip
EULER = ("-n", "7", "--batch-size", "7", "--seed", str(SEED), "--sampler", "euler", "--steps", str(STEPS))
UNGUIDED = (*EULER, "--cfg-scale", "1")


def write_vae(folder: Path, channels: int, scale: float = SCALE, **also: Any) -> Path:
    """A tiny AutoencoderKL of latents with so many channels, which doubles the side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1,
            latent_channels=channels, scaling_factor=scale, shift_factor=SHIFT, mid_block_add_attention=False, **also,
        ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny", CHANNELS)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where nothing is."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def drawn(*arguments: object) -> tuple[Path, np.ndarray, np.ndarray]:
    """The set that the command writes: its folder, images and labels."""
    sample.main([*map(str, arguments), "--npz"])
    (folder,) = {file.parent for file in Path().rglob("samples.npz")}
    with np.load(folder / "samples.npz") as found:
        return folder, found["arr_0"], found["arr_1"]


def decoded(vae: Path, x: Tensor, scale: float = SCALE) -> np.ndarray:
    """What diffusers' own code makes of latents, as uint8 (n, H, W, 3)."""
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        pixels = network.decode(x.float() / scale + SHIFT).sample
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def noise(count: int, side: int = 6) -> Tensor:
    return normal(SEED, Purpose.SAMPLE_NOISE, torch.arange(count), (CHANNELS, side, side))


def by_euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    """From noise at t = 1 to data at t = 0 in STEPS equal steps."""
    for step in range(STEPS):
        x = x - velocity(x, 1 - step / STEPS) / STEPS
    return x


def in_lightning(content: dict[str, Any]) -> dict[str, Any]:
    both = {f"model._orig_mod.{k}": t for k, t in content["model"].items()}
    return {"state_dict": both | {f"ema_model.{k}": t for k, t in content["ema"].items()}, "epoch": 1}


def compiled_blocks(content: dict[str, Any]) -> dict[str, Any]:
    put = test_formats.in_blocks("_orig_mod")
    return {**content, "ema": {f"module.{put(k)}": t for k, t in content["ema"].items()}, "opt": {"lr": 3}}


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a training checkpoint": lambda content: content,
    "the average alone": lambda content: content["ema"],
    "Lightning's": in_lightning,
    "compiled blocks, another optimiser": compiled_blocks,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["sit", "repa", "stage 1", "stage 2", "sra"])
def test_a_published_file_draws_what_its_own_network_draws(case: str, form: str, vae: Path, tmp_path: Path) -> None:
    content = test_formats.checkpoint(case)
    torch.save(FORMS[form](content), path := tmp_path / "0400000.pt")
    folder, images, labels = drawn(path, *UNGUIDED, *TOLD, "--vae", vae)
    assert folder == Path("samples/0400000-7-euler2-cfg1") and labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    average, y = content["ema"], torch.from_numpy(labels)
    if case == "sit":
        x = by_euler(lambda x, t: -test_formats.official_velocity(average, x, torch.full((7,), 1 - t), y), noise(7))
        assert np.abs(images.astype(int) - decoded(vae, x)).max() <= 1, "float64 of another program"
    else:
        model = SiT(replace(CONFIG, qk_norm="stage" in case), kernels.select({}, torch.device("cpu"))).eval()
        model.load_state_dict({key: average[key] for key in model.state_dict()})
        with torch.no_grad():
            x = by_euler(lambda x, t: model(x, torch.full((7,), t), y)[0], noise(7))
        assert np.array_equal(images, decoded(vae, x))
    assert images.shape == (7, 12, 12, 3) and images.std() > 3
    settings = json.loads((folder / "sample.json").read_text())
    assert settings["stage"] == "0400000" and settings["vae"] == str(vae)
    assert len(settings["model_sha256"]) == 64
    assert [file.name for file in tmp_path.iterdir() if file.name != "here"] == ["0400000.pt"]


def test_other_weights_under_the_same_name_get_a_place_of_their_own(vae: Path, tmp_path: Path) -> None:
    asked = (*UNGUIDED, *TOLD, "--vae", str(vae), "--npz")
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        torch.save(test_formats.drawn(test_formats.foreign_shapes("repa"), seed), tmp_path / str(seed) / "last.pt")
        sample.main([str(tmp_path / str(seed) / "last.pt"), *asked])
    names = sorted(path.name for path in Path("samples").iterdir())
    assert len(names) == 2 and names[0] == "last-7-euler2-cfg1" and names[1].startswith("last-7-euler2-cfg1-ema-step0-")
    sample.main([str(tmp_path / "1" / "last.pt"), *UNGUIDED, *TOLD, "--vae", str(vae)])
    sample.main([str(tmp_path / "1" / "last.pt"), *UNGUIDED, *TOLD, "--vae", str(vae), "--interpolate", "0", "3"])
    sample.main([str(tmp_path / "1" / "last.pt"), *UNGUIDED, *TOLD, "--vae", str(vae), "--gif"])
    pictures = sorted(path.name for path in Path("samples").iterdir() if path.is_file())
    assert pictures == [
        "last-7-euler2-cfg1.png", "last-interpolate-0-3-euler2-cfg1.png", "last-trajectory-7-euler2-cfg1.gif"
    ]  # fmt: skip


def test_a_model_without_a_null_class_is_drawn_unguided_and_guidance_is_refused(vae: Path, tmp_path: Path) -> None:
    content = test_formats.checkpoint("repa")
    rows = content["ema"]["y_embedder.embedding_table.weight"].shape[0]
    args = argparse.Namespace(prediction="v", class_dropout_prob=0.0)
    torch.save({"ema": content["ema"], "args": args}, path := tmp_path / "plain.pt")
    _, _, labels = drawn(path, *EULER, "--heads", HEADS, "--vae", vae)
    assert rows == CLASSES + 1 and labels.tolist() == [0, 1, 2, 3, 4, 5, 0], "the last row is a class of its own"
    with pytest.raises(UserError, match=r"--cfg-scale 1.5: the model has no null class"):
        sample.main([str(path), *EULER, "--heads", str(HEADS), "--vae", str(vae), "--cfg-scale", "1.5"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder, vae=write_vae(folder / "tiny", 4, scale=1.3))


def images_of(model: Path, out: Path, *options: object) -> np.ndarray:
    sample.main([str(model), "--npz", "--out", str(out), *map(str, options)])
    with np.load(out / "samples.npz") as found:
        return found["arr_0"]


def test_a_pipeline_draws_the_images_of_the_run_it_came_from_to_the_bit(made: Path, tmp_path: Path) -> None:
    convert([str(made), str(tmp_path / "pipe"), "--to", "diffusers"])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "pipe").rglob("*")}
    ours = images_of(made, tmp_path / "ours", "-n", 12)
    folder, theirs, _ = drawn(tmp_path / "pipe", "-n", 12, "--seed", 3, "--batch-size", 4)
    assert np.array_equal(ours, theirs) and ours.shape == (12, 16, 16, 3) and ours.std() > 3
    assert folder == Path("samples/pipe-12-heun3-cfg2"), "the sampler, steps and guidance are the run's"
    settings = json.loads((folder / "sample.json").read_text())
    assert settings["cfg_range"] == [0.0, 0.7] and settings["vae"] == str(tmp_path / "pipe" / "vae")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "pipe").rglob("*")}
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"guidance_scale": "much"}))
    with pytest.raises(UserError, match=r'model_index.json: sample.cfg_scale = "much"'):
        sample.main([str(tmp_path / "pipe")])


def test_a_huggingface_folder_draws_the_images_of_its_run_with_the_vae_given(made: Path, tmp_path: Path) -> None:
    convert([str(made), str(tmp_path / "model"), "--to", "huggingface"])
    how = ("-n", 12, "--sampler", "heun", "--steps", 3, "--cfg-scale", 2, "--cfg-range", 0, 0.7, "--batch-size", 4)
    ours = images_of(made, tmp_path / "ours", *how)
    _, theirs, _ = drawn(tmp_path / "model", *how, "--seed", 3, "--vae", made.parent / "data" / "vae")
    assert np.array_equal(ours, theirs), "the data's scale, 2, is in config.json; the VAE's own is 1.3"
    with_data = images_of(tmp_path / "model", tmp_path / "data's", *how, "--seed", 3, "--data", made.parent / "data")
    assert np.array_equal(ours, with_data)
    images_of(made, tmp_path / "told", *how, "--vae", made.parent / "tiny")
    assert json.loads((tmp_path / "told" / "sample.json").read_text())["vae"] == str(made.parent / "tiny")


def test_a_pipeline_of_pixels_needs_no_vae(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    convert([str(run), str(tmp_path / "pipe"), "--to", "diffusers"])
    theirs = images_of(tmp_path / "pipe", tmp_path / "a", "-n", 5, "--seed", 3, "--batch-size", 4)
    assert np.array_equal(theirs, images_of(run, tmp_path / "b", "-n", 5)) and theirs.std() > 3


def test_raw_weights_are_those_of_the_file_and_of_one_set_refused(vae: Path, tmp_path: Path) -> None:
    content = test_formats.checkpoint("repa")
    torch.save(content, tmp_path / "both.pt")
    torch.save(content["model"], tmp_path / "raw.pt")
    how = (*UNGUIDED, *TOLD, "--vae", vae)
    raw = images_of(tmp_path / "both.pt", tmp_path / "a", *how, "--weights", "raw")
    assert np.array_equal(raw, images_of(tmp_path / "raw.pt", tmp_path / "b", *how))
    assert not np.array_equal(raw, images_of(tmp_path / "both.pt", tmp_path / "c", *how))
    with pytest.raises(UserError, match=r"--weights raw: .*raw.pt holds one set of weights"):
        sample.main([str(tmp_path / "raw.pt"), *map(str, how), "--weights", "raw"])


def test_a_file_in_a_runs_folder_is_a_model_by_itself(made: Path, vae: Path, tmp_path: Path) -> None:
    torch.save(test_formats.checkpoint("repa"), tmp_path / "in.pt")
    place = shutil.copy(tmp_path / "in.pt", made / "plain" / "checkpoints" / "other.pt")
    how = (*UNGUIDED, *TOLD, "--vae", vae)
    assert np.array_equal(
        images_of(Path(place), tmp_path / "a", *how), images_of(tmp_path / "in.pt", tmp_path / "b", *how)
    )
    Path(place).unlink()


def test_what_lies_in_a_run_is_the_runs(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage, its checkpoints and one of them, wherever the command is started."""
    stage = made / "plain"
    expected = images_of(made, tmp_path / "ours", "-n", 4)
    for place in (stage, stage / "checkpoints", next((stage / "checkpoints").iterdir())):
        assert np.array_equal(images_of(place, tmp_path / place.name, "-n", 4), expected)
        sample.main([str(place), "-n", "4", "--npz"])
        assert capsys.readouterr().out.splitlines()[-1] == str(stage / "samples" / "4-heun3-cfg2")
    assert not Path("samples").exists()
    with pytest.raises(UserError, match=r"--stage other: .* is of plain"):
        sample.main([str(stage), "--stage", "other"])
    with pytest.raises(UserError, match=r"--heads 2: .* tells it itself"):
        sample.main([str(stage), "--heads", "2"])


def test_what_a_path_stands_for_in_a_run(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = next((made / "plain" / "checkpoints").iterdir())
    for inside, expected in {
        "": (None, None), "plain": ("plain", None), "plain/checkpoints": ("plain", None),
        f"plain/checkpoints/{step.name}": ("plain", step),
    }.items():  # fmt: skip
        assert place_in_run(made / inside) == (made, *expected)
        monkeypatch.chdir(made / inside)
        assert place_in_run(Path()) == (made, *expected), "as a user calls it who stands there"
    below = ("plain/published", "plain/checkpoints/a/b", "other", "samples/plain", "plain/other/a")
    for inside in below:
        (made / inside).mkdir(parents=True, exist_ok=True)
        assert place_in_run(made / inside) is None
    assert place_in_run(made.parent.parent) is None and place_in_run(step / "manifest.json") is None
    for inside in sorted(below, key=len, reverse=True):
        shutil.rmtree((made / inside), ignore_errors=True)
    shutil.rmtree(made / "samples")
    shutil.rmtree(made / "plain" / "other")
    shutil.rmtree(made / "plain" / "checkpoints" / "a")


def test_options_of_files_are_refused_for_folders(made: Path, tmp_path: Path) -> None:
    convert([str(made), str(tmp_path / "model"), "--to", "huggingface"])
    for options in (["--heads", "2"], ["--num-classes", "5"], ["--from", "repa"]):
        with pytest.raises(UserError, match=rf"{' '.join(options)}: .*model tells it itself; this is for files"):
            sample.main([str(tmp_path / "model"), *options])
    with pytest.raises(UserError, match=r"--stage other: the run has plain"):
        sample.main([str(made), "--stage", "other"])


def test_an_older_checkpoint_of_a_run_is_drawn_from(tmp_path: Path) -> None:
    old = make_run(tmp_path, seed=0, step=10)
    first = images_of(old, tmp_path / "first", "-n", 4)
    make_run(tmp_path, seed=1, step=20)
    folders = sorted((old / "plain" / "checkpoints").iterdir())
    assert len(folders) == 2
    again = images_of(folders[0], tmp_path / "again", "-n", 4)
    assert np.array_equal(again, first)
    assert not np.array_equal(images_of(old, tmp_path / "newest", "-n", 4), first)


def unreachable(name: str) -> None:
    raise ConnectionError("nothing is")


def test_a_checkpoint_without_its_run_has_its_recipe_in_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images_of(made, tmp_path / "ours", "-n", 8)
    copied = Path(shutil.copytree(made / "plain" / "checkpoints", tmp_path / "kept" / "checkpoints"))
    step = next(copied.iterdir())
    for place in (copied.parent, copied, step):
        assert np.array_equal(images_of(place, tmp_path / f"of {place.name}", "-n", 8), expected)
    sample.main([str(step), "-n", "8", "--npz"])
    (folder,) = Path("samples").iterdir()
    assert folder.name == f"{step.name}-8-heun3-cfg2"
    monkeypatch.setattr("st_fast.model.vae._reach", unreachable)
    manifest = read_manifest(made.parent / "data")
    write_manifest(made.parent / "data", replace(manifest, source="drawn anew"))  # the folder holds something else now
    told = json.loads((step / "manifest.json").read_text())
    told["meta"]["dataset"] = manifest.digest
    (step / "manifest.json").write_text(json.dumps(told | {"digest": digest_of(told)}))
    with pytest.raises(UserError, match=r"sd-vae-ft-ema.*can't be had from the hub"):
        sample.main([str(step), "-n", "8", "--npz", "--out", str(tmp_path / "no")])
    write_manifest(made.parent / "data", manifest)
    assert np.array_equal(images_of(step, tmp_path / "the same", "-n", 8), expected)
    shutil.move(made.parent / "data", tmp_path / "away")
    try:
        vae = tmp_path / "away" / "vae"
        with pytest.raises(UserError, match=r"sd-vae-ft-ema.*can't be had from the hub"):
            sample.main([str(step), "-n", "8", "--npz", "--out", str(tmp_path / "no")])
        found = images_of(step, tmp_path / "moved", "-n", 8, "--data", tmp_path / "away")
        assert np.array_equal(found, expected)
        assert not np.array_equal(
            images_of(step, tmp_path / "scaled", "-n", 8, "--vae", vae), expected
        )  # by 1.3, not 2
    finally:
        shutil.move(tmp_path / "away", made.parent / "data")


def test_an_imported_stage_is_drawn_from(vae: Path, tmp_path: Path) -> None:
    torch.save(test_formats.checkpoint("sit"), tmp_path / "in.pt")
    convert([str(tmp_path / "in.pt"), str(tmp_path / "stage"), "--heads", str(HEADS)])
    first = images_of(tmp_path / "in.pt", tmp_path / "a", *UNGUIDED, *TOLD, "--vae", vae)
    assert np.array_equal(images_of(tmp_path / "stage", tmp_path / "b", *UNGUIDED, "--vae", vae), first)


def test_the_usual_vae_of_four_channels_is_told_and_of_others_one_is_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(foreign.TINY, latent_size=6)
    torch.save(foreign.repa_weights(config, 1), tmp_path / "four.pt")
    usual = write_vae(tmp_path / "usual", 4)
    monkeypatch.setattr("st_fast.model.vae.PRESETS", {"sd-vae-ft-ema": str(usual)})
    monkeypatch.setattr("st_fast.model.vae._reach", pytest.fail)
    told = ("--heads", "2", "--num-classes", "5")
    asked = images_of(tmp_path / "four.pt", tmp_path / "a", *UNGUIDED, *told, "--vae", usual)
    assert "decoded by" not in capsys.readouterr().out
    assert np.array_equal(images_of(tmp_path / "four.pt", tmp_path / "b", *UNGUIDED, *told), asked)
    line = f"{tmp_path / 'four.pt'}: decoded by sd-vae-ft-ema, as is usual for 4 channels; --vae takes another"
    assert capsys.readouterr().out.count(line) == 1
    torch.save(test_formats.checkpoint("repa"), tmp_path / "three.pt")
    with pytest.raises(
        UserError, match=r"three.pt: nothing says what decodes its 3 channels; --vae or --data is needed"
    ):
        sample.main([str(tmp_path / "three.pt"), *TOLD])
    with pytest.raises(UserError, match=r"--vae .*usual: 4 channels, .*three.pt has 3"):
        sample.main([str(tmp_path / "three.pt"), *TOLD, "--vae", str(usual)])
    normalised = write_vae(tmp_path / "normalised", 3, latents_mean=[0.1, 0.2, 0.3], latents_std=[1.0, 2.0, 3.0])
    found = images_of(tmp_path / "three.pt", tmp_path / "c", *UNGUIDED, *TOLD, "--vae", normalised)
    plain = images_of(
        tmp_path / "three.pt", tmp_path / "d", *UNGUIDED, *TOLD, "--vae", write_vae(tmp_path / "plain", 3)
    )
    model = SiT(replace(CONFIG, qk_norm=False), kernels.select({}, torch.device("cpu"))).eval()
    average = test_formats.checkpoint("repa")["ema"]
    model.load_state_dict({key: average[key] for key in model.state_dict()})
    with torch.no_grad():
        x = by_euler(lambda x, t: model(x, torch.full((7,), t), torch.arange(7) % 5)[0], noise(7))
    mean, std = (torch.tensor(value)[None, :, None, None] for value in ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]))
    assert np.array_equal(found, decoded(normalised, std * x + SCALE * mean)), "z = std * x / scale + mean + shift"
    assert np.array_equal(plain, decoded(normalised, x)) and not np.array_equal(found, plain)


def test_what_the_file_left_out_is_told_once(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = test_formats.checkpoint("repa")
    torch.save(content | {"args": Path("args.json")}, tmp_path / "in.pt")
    drawn(tmp_path / "in.pt", *UNGUIDED, *TOLD, "--vae", vae)
    assert capsys.readouterr().out.count("in.pt: args are not read, an instance of 'str': a linear path and a vel") == 1
    vars(content["args"])["encoder"] = Encoder()
    torch.save(content, tmp_path / "in.pt")
    sample.main([str(tmp_path / "in.pt"), *UNGUIDED, *TOLD, "--vae", str(vae), "--npz"])
    line = "in.pt: args without ['encoder'], instances of classes that are not read"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FILE"], r"no published size, so number_of_heads must be given \(convert, sample, evaluate and probe take"),
        (["FILE", "--heads", "2", "--num-classes", "9"], r"num_classes = 9, but y_embedder has 6 rows"),
        (["FILE", *TOLD, "--stage", "plain"], r"--stage plain: .* is no run"),
        (["FILE", *TOLD, "--data", "RUN/../data"], r"--data .*: latents of \(4, 8, 8\), .* draws \(3, 6, 6\)"),
        (["FILE", *TOLD, "--prompt", "a fox"], r"--prompt: .* draws classes"),
        (["FILE", *TOLD, "--from", "sra", "--vae", "VAE"], r"as sra: .* unexpected"),
        (["RUN", "--data", "RUN/../data"], r"--data .*: .* tells it itself; this is for a model by itself"),
        (["RUN", "--from", "sit"], r"--from sit: .* tells it itself"),
        (["NONE"], r"none: no recipe.toml, so no run of st_fast.train, and no other model"),
        (["EMPTY"], r"empty: no recipe.toml"),
        (["TEXT"], r"notes.pt: .*"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(arguments: list[str], words: str, made: Path, vae: Path, tmp_path: Path) -> None:
    torch.save(test_formats.checkpoint("repa"), tmp_path / "in.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.pt").write_text("nothing")
    files = {"FILE": "in.pt", "NONE": "none", "EMPTY": "empty", "TEXT": "notes.pt"}
    names = {"RUN": made, "VAE": vae} | {name: tmp_path / file for name, file in files.items()}
    for name, place in names.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    with pytest.raises(UserError, match=words) as told:
        sample.main(arguments)
    assert "\n" not in str(told.value) and not Path("samples").exists()


def test_a_name_on_the_hub_is_fetched_and_a_typing_error_is_not_asked_for(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert([str(made), str(tmp_path / "pipe"), "--to", "diffusers"])
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "pipe")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("st_fast.model.vae._reach", lambda name: None)
    folder, images, _ = drawn("someone/tiny-sit", "-n", 4, "--seed", 3)
    assert folder.name == "tiny-sit-4-heun3-cfg2" and images.shape == (4, 16, 16, 3)
    ((name, files),) = asked
    assert name == "someone/tiny-sit" and "vae/diffusion_pytorch_model.safetensors" in files
    assert not any("bin" in file or "py" in file.replace("pytorch", "") for file in files)
    Path("runs").mkdir()
    with pytest.raises(UserError, match=r"runs/digitz: no recipe.toml"):
        sample.main(["runs/digitz"])
    assert len(asked) == 1


def test_a_model_of_text_without_data_reads_prompts(
    run: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("st_fast.convert.text.load_text_encoder", encoder.loaded)
    convert([str(run), str(tmp_path / "model"), "--to", "huggingface"])
    how = ("--prompt", "a fox", "--prompt", "number 2", "-n", 4, "--batch-size", 4)
    settings = ("--sampler", "heun", "--steps", 3, "--cfg-scale", 2, "--cfg-range", 0, 0.7, "--seed", 3)
    vae = ("--vae", write_vae(tmp_path / "vae", 3, scale=20.0))  # as the data's latents are
    ours = images_of(run, tmp_path / "ours", *how, *vae)
    theirs = images_of(tmp_path / "model", tmp_path / "theirs", *how, *settings, *vae, "--text-encoder", "x")
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # states are not rounded to float16
    assert ours.std() > 3 and encoder.given[-1][0] == "x"
    with pytest.raises(UserError, match=r"no decoder of the latents in .*model \(in brackets\): scale 2 \(20\)"):
        sample.main([str(tmp_path / "model"), "--prompt", "a", "--vae", "pixels", "--text-encoder", "x"])
    with pytest.raises(UserError, match=r"no prompt; --prompt or --prompts, or a data folder with captions"):
        sample.main([str(tmp_path / "model"), "--vae", "pixels"])
    with_data = images_of(tmp_path / "model", tmp_path / "data's", *settings, "-n", 3, "--data", run.parent / "data")
    assert np.array_equal(with_data, images_of(run, tmp_path / "captions", "-n", 3, *settings))


def test_a_pipeline_of_text_has_its_own_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = load_text_encoder(
        str(tiny_text.write_text_encoder(tmp_path / "bert")), torch.device("cpu"), torch.float32, 7, mask=True
    )
    config = replace(
        CONFIG, network="mmdit", width=32, latent_size=8, text_width=16, text_length=7, qk_norm=True, class_dropout=0.1
    )
    loaded = LoadedState(
        config, "repa", weights := {**foreign.trunk(config, 1), "null_context": encoder([""])}, weights
    )
    write_diffusers(ModelSource(loaded, tmp_path), "ema", "t", None, str(tmp_path / "bert"), tmp_path / "pipe")
    how = ("--prompt", "a red fox", "--prompt", "two", "-n", "4", "--seed", "8", "--sampler", "euler", "--steps", "2")
    found = images_of(tmp_path / "pipe", tmp_path / "a", *how, "--cfg-range", 0, 1, "--vae", "pixels")
    model = MMDiT(config, kernels.select({}, torch.device("cpu"))).eval()
    model.load_state_dict(weights)
    states, x = encoder(["a red fox", "two"] * 2), normal(8, Purpose.SAMPLE_NOISE, torch.arange(4), (3, 8, 8))
    with torch.no_grad():
        for t in (1.0, 0.5):
            with_text, without = (model(x, torch.full((4,), t), y)[0] for y in (states, encoder([""] * 4)))
            x = x - (without + 1.8 * (with_text - without)) / 2
    expected = ((x / 2 + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1 and found.std() > 3
    assert json.loads((tmp_path / "a" / "sample.json").read_text())["cfg_scale"] == 1.8


def test_a_published_model_of_text_takes_the_empty_captions_states_from_the_encoder(
    run: Path, encoder: Encoder, tmp_path: Path
) -> None:
    loaded = read_model(run, pytest.fail).loaded
    table = {key: tensor.clone() for key, tensor in loaded.ema.items() if key != "null_context"}
    args = argparse.Namespace(prediction="v", text_length=tiny_text.LENGTH)
    torch.save({"ema": table, "args": args}, path := tmp_path / "t2i.pt")
    save_file(table, tmp_path / "bare.safetensors")
    how = ("--prompt", "a fox", "-n", 3, "--cfg-scale", 3, "--sampler", "euler", "--steps", 3, "--seed", 3)
    with pytest.raises(UserError, match=r"--text-encoder FOLDER: needed, for nothing names the encoder"):
        sample.main([str(path), "--prompt", "a", "--heads", "2", "--vae", "pixels"])
    alone = ("--text-encoder", "x/tiny-encoder", "--heads", 2, "--vae", "pixels")
    theirs = images_of(path, tmp_path / "theirs", *how, *alone)
    assert theirs.shape == (3, 8, 8, 3) and theirs.std() > 3 and "" in encoder.read
    ours = images_of(run, tmp_path / "ours", *how, "--cfg-range", 0, 1)
    data = ("--data", run.parent / "data", "--text-encoder", tiny_text.ENCODER, "--heads", 2)
    for file in (path, tmp_path / "bare.safetensors"):  # of which the second tells no length: the data's is taken
        with_data = images_of(file, tmp_path / file.stem, *how, "--cfg-range", 0, 1, *data)
        assert np.abs(with_data.astype(int) - ours).max() <= 1  # its null is the encoder's, not rounded to float16


def test_data_of_fewer_classes_is_taken_and_of_more_refused(vae: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    convert([str(run), str(tmp_path / "model"), "--to", "huggingface"])
    manifest = read_manifest(tmp_path / "data")
    write_manifest(tmp_path / "data", replace(manifest, num_classes=6))
    with pytest.raises(UserError, match=r"--data .*: 6 classes, .*model has 5"):
        sample.main([str(tmp_path / "model"), "--data", str(tmp_path / "data")])

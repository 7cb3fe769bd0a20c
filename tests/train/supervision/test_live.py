"""Encoders that run while training: written features' values, only while they supervise, of the right images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.data.ahead import Patience
from st_fast.data.images import load_image
from st_fast.data.layouts.repa import RepaSet
from st_fast.data.loader import ResidentLoader
from st_fast.data.shards import open_data
from st_fast.data.sources import open_source
from st_fast.model.compiling import CompiledBlocks
from st_fast.model.encoders import VisionTransformer, load_encoder
from st_fast.prepare import __main__ as prepare
from st_fast.prepare.features import SourceImages, open_record_images
from st_fast.recipe import Recipe, cost, load
from st_fast.train.batches import BatchIterator, compile_encoders, open_image_features
from st_fast.train.run import run
from st_fast.train.supervision import Parts, create
from tests import tiny
from tests.data.conftest import encoded, picture
from tests.data.test_repa import write_layout
from tests.model.test_vision import clip, saved
from tests.train.supervision.encoders import write_encoder
from tests.train.supervision.resuming import assert_it_resumes_bit_exactly_and_learns, interrupt
from tests.train.supervision.test_losses import TABLE
from tests.train.test_training import signals  # noqa: F401

CPU = torch.device("cpu")
FLOAT16 = 2.0**-11
"""Written features are rounded to float16: half a unit in the last of its 11 places."""
RECIPE = """
[model]
depth = 2
width = 32
heads = 2
patch = 8
channels = 3
latent_size = 16
num_classes = 2
[data]
path = "{data}"
images = "{images}"
loader = "resident"
[optim]
batch_size = 8
lr = 1e-2
[run]
out = "{out}"
device = "cpu"
log_every = 1
save_every = 4
[sample]
num = 0
[[stage]]
name = "repa"
supervision = "repa"
features = "live"
steps = 8
encoders = ["{one}", "{two}"]
depth = 1
hidden = 16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one of them broken; latents of them and of the mirrored ones; a DINOv2's and a CLIP's features."""
    root = tmp_path_factory.mktemp("live")
    for number in range(10):
        (root / "images" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        (root / "images" / f"class {number % 2}" / f"{number}.png").write_bytes(encoded(picture(number)))
    (root / "images" / "class 1" / "3.png").write_bytes(b"no picture")
    arguments = [root / "images", root / "data", "--size", 16, "--vae", "pixels", "--device", "cpu", "--flip"]
    prepare.main([str(argument) for argument in arguments])
    write_encoder(root / "dino", registers=2)
    saved(root / "clip", clip, 7)
    for name in ("dino", "clip"):
        arguments = ["--features", root / name, root / "images", root / "data", "--size", 16, "--device", "cpu"]
        prepare.main([str(argument) for argument in arguments])
    return root


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> Path:
    path = tmp_path / "live.toml"
    names = {"one": place / "dino", "two": place / "clip"}
    path.write_text(RECIPE.format(data=place / "data", images=place / "images", out=tmp_path / "out", **names))
    return path


def batches_of(recipe: Recipe, count: int = 1) -> dict[int, tuple[int, torch.Tensor, tuple[torch.Tensor, ...]]]:
    """By ordinal: the record, its image and its features, as all of `count` ranks have them."""
    records, found = open_data(Path(recipe.data.path), verify=False), {}
    for rank in range(count):
        ranks = Ranks(rank, count, CPU)
        features = open_image_features(recipe.stages[0], recipe, records, CPU, torch.float32)
        loaders = features.loaders(CPU)
        iterator = BatchIterator(recipe, recipe.stages[0], ResidentLoader(records, CPU), records, ranks, loaders)
        for batch in (batch for batches in iterator.steps(0, 8) for batch in batches):
            made = batch.features or tuple(encoder(batch.images) for encoder in features.encoders)
            ordinals = batch.ordinals.tolist()
            for row, (ordinal, record) in enumerate(zip(ordinals, iterator.order(np.array(ordinals)), strict=True)):
                image = None if batch.images is None else batch.images[row]
                found[ordinal] = (int(record), image, tuple(one[row] for one in made))
        for loader in loaders:
            loader.close()
    return found


def test_live_features_are_the_written_ones_up_to_their_rounding(recipe: Path, place: Path) -> None:
    live = batches_of(load(recipe, ["--optim.accumulation=2"]), 2)
    written = batches_of(load(recipe, ["--stage.repa.features=written"]))
    assert live.keys() == written.keys() == set(range(64))
    for ordinal, (record, _, features) in written.items():
        assert live[ordinal][0] == record
        for ours, theirs in zip(live[ordinal][2], features, strict=True):
            assert ours.dtype == torch.float32 and theirs.dtype == torch.float16
            torch.testing.assert_close(ours, theirs.float(), rtol=FLOAT16, atol=1e-5)


def test_every_record_brings_the_picture_its_latents_were_made_from(recipe: Path, place: Path) -> None:
    files = sorted((place / "images").rglob("*.png"), key=lambda file: file.as_posix())
    pictures = [load_image(file.read_bytes(), 16, 3) for file in files if file.read_bytes() != b"no picture"]
    records = open_data(place / "data")
    assert len(records) == 2 * len(pictures) == 18
    for record, image, _ in batches_of(load(recipe)).values():
        pixels = pictures[record // 2][:, :, :: -1 if record % 2 else 1]
        assert np.array_equal(image.numpy(), pixels)
        mean = records.gather(np.array([record]))[0][0, :3].float()  # the pixels VAE: latents are the picture
        assert np.abs(mean.numpy() * 127.5 + 127.5 - pixels).max() < 0.1


def test_images_left_out_before_they_were_written_down_are_found_by_looking(place: Path, tmp_path: Path) -> None:
    note, records = place / "data" / "skipped.json", open_data(place / "data")
    assert "3.png" in note.read_text()
    told = SourceImages(open_source(place / "images"), records, 16)
    note.rename(tmp_path / "note")
    try:
        looked = SourceImages(open_source(place / "images"), records, 16)
    finally:
        (tmp_path / "note").rename(note)
    assert np.array_equal(told.numbers, looked.numbers) and len(looked.numbers) == 9


def test_a_run_supervises_until_the_stop_and_looks_at_no_image_after_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {"read": 0, "encoded": 0}
    read, forward = SourceImages.read_into, VisionTransformer.__call__

    def reading(self: SourceImages, indices: np.ndarray, out: np.ndarray) -> None:
        calls["read"] += len(indices)
        read(self, indices, out)

    def encoding(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        calls["encoded"] += len(images)
        return forward(self, images)

    monkeypatch.setattr(SourceImages, "read_into", reading)
    monkeypatch.setattr(VisionTransformer, "__call__", encoding)
    settings = load(recipe, ["--stage.repa.stop_step=5"])
    run(settings)
    assert calls == {"read": 5 * 8, "encoded": 2 * 5 * 8}
    logged = tiny.records(tmp_path / "out", "train")
    assert [record["aux"] != 0 for record in logged] == [True] * 5 + [False] * 3
    each = sum(load_encoder(name, CPU, torch.float32).flops(16) for name in settings.stages[0].method.encoder_names)
    plain = cost.stage_flops(settings, settings.stages[0], 0, 8, cost.stage_cost(settings, settings.stages[0], 0.0))
    assert each > 0 and logged[-1]["flops"] == pytest.approx(plain + 5 * 8 * each)
    (start,) = tiny.records(tmp_path / "out", "start")
    assert start["teacher_flops_per_image"] == pytest.approx(each)


def test_an_interrupted_run_resumes_bit_exactly_and_learns(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: Any,  # noqa: F811
    one_thread: None,
) -> None:
    assert_it_resumes_bit_exactly_and_learns(recipe, tmp_path, monkeypatch)


def test_a_run_goes_on_only_with_the_same_features(
    recipe: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: Any,  # noqa: F811
) -> None:
    interrupt(load(recipe), monkeypatch)
    other = saved(tmp_path / "clip", clip, 7, seed=1)[1]
    with pytest.raises(UserError, match="encoder clip: the features changed"):
        run(load(recipe, [f'--stage.repa.encoders=["{place / "dino"}", "{other}"]']), accept_changes=True)
    written = load(recipe, ["--stage.repa.features=written"])
    with pytest.raises(UserError, match=r'stage.repa.features: "live" → "written"'):
        run(written)
    run(written, accept_changes=True)


def test_a_read_that_fails_once_is_tried_again_and_a_broken_picture_is_named(
    recipe: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(recipe)
    features = open_image_features(settings.stages[0], settings, open_data(place / "data"), CPU, torch.float32)
    assert isinstance(features.images, SourceImages)
    source = features.images.source
    failures = [OSError("stale handle")]

    def flaky(number: int) -> bytes:
        if failures:
            raise failures.pop()
        return source.read(number)

    monkeypatch.setattr("st_fast.train.batches.ReadAhead.__init__.__defaults__", (2, 4, False, Patience(60, 3, 0.01)))
    features.images.source = type(source)(**{**vars(source), "read": flaky})
    (loader,) = features.loaders(CPU)
    ((images, labels),) = loader.stream([np.array([0, 5])])
    assert images.shape == (2, 3, 16, 16) and not failures and len(labels) == 2
    features.images.source = type(source)(**{**vars(source), "read": lambda number: b"no picture"})
    with pytest.raises(UserError) as refused:
        list(loader.stream([np.array([4])]))
    loader.close()
    assert "4.png" in str(refused.value) and "has a latent" in str(refused.value) and "\n" not in str(refused.value)


def refusal(recipe: Path, *options: str) -> str:
    with pytest.raises(UserError) as refused:
        run(load(recipe, options))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_is_told_before_training(recipe: Path, place: Path, tmp_path: Path) -> None:
    assert "data.images is empty" in refusal(recipe, "--data.images=")
    assert "no such file or folder" in refusal(recipe, f"--data.images={tmp_path / 'nowhere'}")
    fine = write_encoder(tmp_path / "fine", patch=4)
    text = refusal(recipe, f'--stage.repa.encoders=["{fine}"]')
    assert "4 x 4 patches" in text and "2 x 2 tokens" in text and "interpolate = true" in text
    few = tmp_path / "few"
    for name in ("class 0", "class 1"):
        (few / name).mkdir(parents=True)
        (few / name / "1.png").write_bytes(encoded(picture(1)))
    assert "4 images with their mirrored ones, 18 latents" in refusal(recipe, f"--data.images={few}")
    run(load(recipe, [f'--stage.repa.encoders=["{fine}"]', "--stage.repa.interpolate=true", "--stage.repa.steps=2"]))
    assert all(record["aux"] != 0 for record in tiny.records(tmp_path / "out", "train"))


def test_repas_layout_brings_its_own_images(tmp_path: Path) -> None:
    write_layout(tmp_path)
    records = RepaSet(tmp_path)
    images = open_record_images(tmp_path, records, "", "")
    assert images.manifest.shape == (3, 8, 8)
    out = np.empty((2, 3, 8, 8), np.uint8)
    images.read_into(np.array([7, 2]), out)
    for row, number in zip(out, (7, 2), strict=True):
        assert np.array_equal(row, load_image(encoded(picture(number, (8, 8))), 8, 3))
    (tmp_path / "images" / "00000" / "img00000002.png").write_bytes(encoded(picture(2, (10, 8))))
    with pytest.raises(UserError, match=r"img00000002\.png.*10 x 8 pixels, 8 x 8 needed"):
        images.read_into(np.array([2]), out[:1])
    raw = tmp_path / "raw"  # what REPA's images were cropped from, as 4 x 4 latents of a Stable Diffusion VAE
    for number, label in enumerate(records.labels):
        (raw / f"class {label}").mkdir(parents=True, exist_ok=True)
        (raw / f"class {label}" / f"{number}.png").write_bytes(encoded(picture(number, (50, 40))))
    order = np.argsort(records.labels, kind="stable")
    records.labels = records.labels[order]
    cropped = open_record_images(tmp_path, records, str(raw), "")
    cropped.read_into(np.array([0]), big := np.empty((1, 3, 32, 32), np.uint8))
    assert np.array_equal(big[0], load_image(encoded(picture(int(order[0]), (50, 40))), 32, 3))
    (tmp_path / "images" / "00000" / "img00000002.png").rename(tmp_path / "images" / "00000" / "img00000099.png")
    with pytest.raises(UserError, match=r"img00000003\.png.* stands where the image of .*00000002"):
        open_record_images(tmp_path, records, "", "")


def test_the_target_is_made_of_the_images_without_gradient(recipe: Path, place: Path) -> None:
    settings = load(recipe)
    stage = settings.stages[0]
    features = open_image_features(stage, settings, open_data(place / "data"), CPU, torch.float32)
    parts = Parts(settings.model, TABLE, None, feature_widths=features.widths, encoders=features.encoders)
    assert features.widths == (24, 24) and features.flops_beforehand == 0
    repa = create(stage, parts, 0)
    assert repa.parts.encoders is features.encoders
    compile_encoders(features, print)
    assert all(isinstance(one.run, CompiledBlocks) for one in features.encoders if isinstance(one, VisionTransformer))

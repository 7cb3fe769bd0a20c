"""The classifier is good at real digits, repeatable, kept with proof, and its verdicts on samples can be trusted."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from st_fast.core.errors import UserError
from st_fast.evaluate.classifier import (
    Classifier,
    Reference,
    classifier_metrics,
    load_classifier,
    load_or_train,
    make_reference,
    read_images,
)
from tests import tiny_shapes


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the real digits at 32×32, 360 of them held out."""
    folder = tmp_path_factory.mktemp("digits")
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.images))
    grey = (source.images[order] * 255 / 16).astype(np.uint8)
    resized = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in grey]
    images = torch.from_numpy(np.stack([np.asarray(image) for image in resized]))
    labels = torch.from_numpy(source.target[order].astype(np.int64))
    tensors = {"test": images[:360], "test_labels": labels[:360], "train": images[360:], "train_labels": labels[360:]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "images.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(digits: Path) -> tuple[Classifier, Reference, float]:
    start = time.process_time()
    classifier, reference = load_classifier(digits, lambda _: None)
    return classifier, reference, time.process_time() - start


def test_97_percent_accuracy_on_held_out_digits_within_the_time_allowed(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    classifier, _, cpu_seconds = trained
    real = read_images(digits)
    assert (classifier.predict(real.test) == real.test_labels.numpy()).mean() == classifier.accuracy
    assert classifier.accuracy >= 0.97
    assert cpu_seconds <= 60, "30 s on 2 cores"


def test_a_kept_classifier_is_loaded_not_trained_and_answers_the_same(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    said: list[str] = []
    again = load_or_train(digits, said.append)
    images = read_images(digits).test[:40]
    assert said == []
    assert (again.digest, again.accuracy) == (trained[0].digest, trained[0].accuracy)
    np.testing.assert_array_equal(again.features(images), trained[0].features(images))
    manifest = json.loads((digits / "classifier" / "manifest.json").read_text())
    assert manifest["accuracy"] == again.accuracy
    assert manifest["model_sha256"] == again.digest


def test_a_classifier_kept_under_its_older_name_is_loaded(
    tmp_path: Path, digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    (tmp_path / "images.safetensors").symlink_to(digits / "images.safetensors")
    shutil.copytree(digits / "classifier", tmp_path / "judge")
    said: list[str] = []
    assert load_or_train(tmp_path, said.append).digest == trained[0].digest
    assert said == [] and not (tmp_path / "classifier").exists()


def test_training_repeats_bit_by_bit_and_leaves_the_global_generator_alone(tmp_path: Path, digits: Path) -> None:
    few = {name: tensor[:200].clone() for name, tensor in load_file(digits / "images.safetensors").items()}
    digests = []
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        save_file(few, tmp_path / name / "images.safetensors")
        torch.manual_seed(seed)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        digests.append(load_or_train(tmp_path / name, lambda _: None).digest)
        assert torch.equal(torch.rand(3), expected)
    assert digests[0] == digests[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A data folder of 150 digits, with its classifier: what replaces it is trained in a moment."""
    folder = tmp_path_factory.mktemp("small")
    few = {name: tensor[:150].clone() for name, tensor in load_file(digits / "images.safetensors").items()}
    save_file(few, folder / "images.safetensors")
    load_or_train(folder, lambda _: None)
    return folder


@pytest.mark.parametrize("damage", ["flipped bit", "truncated manifest", "weights gone", "other images"])
def test_a_damaged_or_foreign_classifier_is_named_and_replaced(damage: str, tmp_path: Path, small: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "data"))
    weights, manifest = folder / "classifier" / "model.safetensors", folder / "classifier" / "manifest.json"
    if damage == "flipped bit":
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 1
        weights.write_bytes(raw)
    elif damage == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif damage == "weights gone":
        weights.unlink()
    else:
        tensors = load_file(folder / "images.safetensors")
        save_file({name: tensor[:100].contiguous() for name, tensor in tensors.items()}, folder / "images.safetensors")
    said: list[str] = []
    classifier = load_or_train(folder, said.append)
    assert "training it again" in said[0]
    assert "classifier" in said[0]
    assert "\n" not in said[0]
    assert sorted(p.name for p in folder.iterdir()) == ["classifier", "images.safetensors"]
    kept = load_or_train(folder, said.append)
    assert kept.digest == classifier.digest


def test_on_a_full_disk_there_is_still_a_classifier_and_no_half_of_one_is_left(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(digits / "images.safetensors")
    save_file({name: t[:200].contiguous() for name, t in tensors.items()}, tmp_path / "images.safetensors")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    said: list[str] = []
    assert load_or_train(tmp_path, said.append).accuracy > 0.5
    assert any("can't be kept" in line and "No space left" in line for line in said)
    assert [p.name for p in tmp_path.iterdir()] == ["images.safetensors"]


def test_an_image_is_scored_alike_alone_and_in_company(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    classifier, images = trained[0], read_images(digits).test
    np.testing.assert_allclose(classifier.features(images[7:8]), classifier.features(images)[7:8], rtol=1e-4, atol=1e-5)


def test_colour_and_other_sizes_are_scored_like_the_grey_original(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    classifier, images = trained[0], read_images(digits).test[:64]
    coloured = classifier.features(images.expand(-1, 3, -1, -1))
    np.testing.assert_allclose(coloured, classifier.features(images), rtol=1e-4, atol=1e-5)
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert (classifier.predict(large[:, 0]) == classifier.predict(images)).mean() > 0.95


def test_real_images_score_the_floor_and_shuffled_labels_and_noise_are_seen(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    classifier, reference, _ = trained
    real = read_images(digits)
    good = classifier_metrics(classifier, real.test, real.test_labels, reference)
    assert good["accuracy"] == classifier.accuracy
    assert good["frechet"] == pytest.approx(reference.floors["floor_frechet"], rel=1e-6)
    assert good["floor_frechet"] == reference.floors["floor_frechet"]
    assert good["classifier_digest"] == classifier.digest
    shifted = classifier_metrics(classifier, real.test, (real.test_labels + 1) % 10, reference)
    assert shifted["accuracy"] < 0.05
    assert shifted["frechet"] == good["frechet"]
    static = torch.randint(0, 256, (200, 32, 32), dtype=torch.uint8)
    noise = classifier_metrics(classifier, static, torch.zeros(200).long(), reference)
    assert noise["frechet"] > 20 * reference.floors["floor_frechet"]
    assert noise["precision"] < 0.1
    json.dumps(good, allow_nan=False)


def test_accuracy_per_class_counts_each_class_alone(digits: Path, trained: tuple[Classifier, Reference, float]) -> None:
    classifier, reference, _ = trained
    real = read_images(digits)
    labels = classifier.predict(real.test)
    labels[labels == 3] = 4
    per_class = classifier_metrics(classifier, real.test, labels, reference)["accuracy_per_class"]
    assert isinstance(per_class, list)
    assert per_class[3] is None, "no sample was asked to be a 3"
    assert 0 < per_class[4] < 1
    assert per_class[:3] + per_class[5:] == [1.0] * 8


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(100, 32, 32), torch.zeros(100).long(), "uint8"),
        (torch.zeros(100, 2, 32, 32, dtype=torch.uint8), torch.zeros(100).long(), "1 or 3"),
        (torch.zeros(100, 32, 32, dtype=torch.uint8), torch.zeros(99).long(), "for 100 images"),
        (torch.zeros(100, 32, 32, dtype=torch.uint8), torch.full((100,), 10), "the classifier knows 0..9"),
        (torch.zeros(64, 32, 32, dtype=torch.uint8), torch.zeros(64).long(), "64 samples of 64 features"),
        (torch.zeros(0, 32, 32, dtype=torch.uint8), torch.zeros(0).long(), "none given"),
    ],
)
def test_samples_that_cant_be_scored_are_refused_in_one_line(
    images: torch.Tensor, labels: torch.Tensor, words: str, trained: tuple[Classifier, Reference, float]
) -> None:
    with pytest.raises(UserError) as error:
        classifier_metrics(trained[0], images, labels, trained[1])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("test_labels"), "no tensor 'test_labels'"),
        (lambda t: t.update(train=t["train"].float()), "uint8"),
        (lambda t: t.update(train_labels=t["train_labels"][:-1]), "one label"),
        (lambda t: t.update(test_labels=t["test_labels"] - 5), "one label ≥ 0"),
    ],
)
def test_wrong_image_files_are_named(change, words: str, tmp_path: Path, digits: Path) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(digits / "images.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "images.safetensors")
    with pytest.raises(UserError, match=r"images\.safetensors") as error:
        load_or_train(tmp_path, lambda _: None)
    assert words in str(error.value)


def test_a_missing_or_broken_image_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_or_train(tmp_path, lambda _: None)
    (tmp_path / "images.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="can't be read"):
        load_or_train(tmp_path, lambda _: None)


def test_reference_needs_more_held_out_images_than_features(
    digits: Path, trained: tuple[Classifier, Reference, float]
) -> None:
    real = read_images(digits)
    with pytest.raises(UserError, match="64 samples of 64 features"):
        make_reference(trained[0], real.train, real.test[:64])


def test_no_command_is_named_for_images_of_several_shapes_which_would_refuse_them(tmp_path: Path) -> None:
    tiny_shapes.write_data(tmp_path)
    with pytest.raises(UserError, match=r"no such file; its latents are of several shapes, for which there are none"):
        read_images(tmp_path)

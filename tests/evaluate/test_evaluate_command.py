"""`python -m st_fast.evaluate`: numbers that agree with SciPy and scikit-learn, each with its protocol."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from st_fast.__main__ import module_of
from st_fast.core.errors import UserError
from st_fast.evaluate import __main__ as evaluate
from st_fast.evaluate import inception, scores
from st_fast.evaluate.classifier import read_images
from st_fast.recipe.schema import Model
from st_fast.sample import __main__ as sample
from st_fast.sample.set import open_npz, write_npz
from tests import foreign
from tests.sample.tiny_run import make_run

SHAPE = (6, 6, 3)


class Projection:
    """Stands for Inception: random features of the pixels, 8 pooled and 5 spatial ones, and 4 classes."""

    sha256 = "5" * 64

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = [rng.normal(size=(108, width)).astype(np.float32) / 10 for width in (8, 5, 4)]

    def __call__(self, images):
        flat = images.reshape(len(images), -1).astype(np.float32) / 128 - 1
        pooled, spatial, logits = (flat @ w for w in self.weights)
        logits = np.exp(logits * 3)
        return inception.Output(pooled, spatial, logits / logits.sum(axis=1, keepdims=True))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scores, "FEATURES", 8)
    monkeypatch.setattr(scores, "SPATIAL", 5)
    monkeypatch.setattr(scores, "CLASSES", 4)
    monkeypatch.setattr(scores, "KID_SUBSETS", 4)


def pictures(seed, count, dark=0.0):
    values = np.random.default_rng(seed).random((count, *SHAPE)) ** (1 + dark)
    return (values * 255).astype(np.uint8)


def npz(path, images, labels=None):
    write_npz(path, images.shape[1:], iter([images]), np.arange(len(images)) % 5 if labels is None else labels)
    return path


def frechet_by_scipy(a, b):
    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(0), np.cov(x.T)) for x in (a.astype(np.float64), b.astype(np.float64)))
    return np.square(mu_a - mu_b).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))


def covered(points, centres):
    """Share of points inside some centre's ball to its third other neighbour, with scikit-learn."""
    radii = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
    distances = np.linalg.norm(points[:, None].astype(np.float64) - centres[None], axis=2)
    return (distances <= radii).any(axis=1).mean()


def test_every_number_agrees_with_its_definition_to_1e_4(tmp_path):
    network, real, drawn = Projection(), pictures(1, 300), pictures(2, 400, dark=0.3)
    samples = open_npz(npz(tmp_path / "s.npz", drawn))
    reference = scores.read_reference(npz(tmp_path / "r.npz", real), network, SHAPE)
    found = scores.score(samples, network, reference)
    a, b = network(drawn), network(real)
    assert found["fid"] == pytest.approx(frechet_by_scipy(a.pooled, b.pooled), rel=1e-4)
    assert found["sfid"] == pytest.approx(frechet_by_scipy(a.spatial, b.spatial), rel=1e-4)
    p = a.probabilities.astype(np.float64)
    divergences = (p * np.log(p / p.mean(axis=0))).sum(axis=1)
    assert found["inception_score"] == pytest.approx(np.exp(divergences.mean()), rel=1e-6)
    assert found["precision"] == pytest.approx(covered(a.pooled, b.pooled), abs=1e-9)
    assert found["recall"] == pytest.approx(covered(b.pooled, a.pooled), abs=1e-9)
    assert 0.1 < found["precision"] < 1, "the case must be able to tell a wrong answer"
    x, y = a.pooled.astype(np.float64), b.pooled.astype(np.float64)
    kernel = [polynomial_kernel(p, q, degree=3, gamma=1 / 8, coef0=1) for p, q in ((x, x), (y, y), (x, y))]
    m, n = len(x), len(y)
    whole = (kernel[0].sum() - np.trace(kernel[0])) / (m * (m - 1))
    whole += (kernel[1].sum() - np.trace(kernel[1])) / (n * (n - 1)) - 2 * kernel[2].mean()
    assert found["kid"] == pytest.approx(whole, abs=4 * found["kid_std"] + 0.1 * abs(whole))


def test_published_statistics_are_used_where_the_file_has_them(tmp_path):
    network, real, drawn = Projection(), pictures(1, 300), pictures(2, 200, dark=0.3)
    seen = network(real)
    moments = {"mu": seen.pooled.mean(0), "sigma": np.cov(seen.pooled.astype(np.float64).T)}
    spatial = {"mu_s": seen.spatial.mean(0), "sigma_s": np.cov(seen.spatial.astype(np.float64).T)}
    np.savez(tmp_path / "adm.npz", **moments, **spatial)
    samples = open_npz(npz(tmp_path / "s.npz", drawn))
    found = scores.score(samples, network, scores.read_reference(tmp_path / "adm.npz", network, SHAPE))
    assert found["fid"] == pytest.approx(frechet_by_scipy(network(drawn).pooled, seen.pooled), rel=1e-4)
    assert found["sfid"] == pytest.approx(frechet_by_scipy(network(drawn).spatial, seen.spatial), rel=1e-4)
    assert "precision" not in found and "kid" not in found, "these need the reference's images"


def test_a_folder_of_pictures_is_a_reference_cut_as_adm_cuts(tmp_path):
    network, real = Projection(), pictures(1, 12)
    (tmp_path / "a").mkdir()
    for number, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "a" / f"{number:02d}.png")
    found = scores.read_reference(tmp_path / "a", network, SHAPE)
    np.testing.assert_allclose(found.features, network(real).pooled, rtol=1e-6)
    with pytest.raises(UserError, match=r"00.png': 6×6, the samples have 8×8"):
        scores.read_reference(tmp_path / "a", network, (8, 8, 3))
    (tmp_path / "a" / "._0.png").write_bytes(b"hidden")
    assert len(scores.read_reference(tmp_path / "a", network, SHAPE).features) == 12
    (tmp_path / "a" / "07.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"07\.png") as error:
        scores.read_reference(tmp_path / "a", network, SHAPE)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_a_reference_that_does_not_fit_is_told_in_one_line(tmp_path):
    network = Projection()
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    np.savez(tmp_path / "other.npz", x=np.zeros(9))
    npz(tmp_path / "large.npz", np.zeros((9, 12, 12, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    cases = {
        "wide.npz": "mu (9,) and sigma (9, 9); these features need (8,) and (8, 8)",
        "other.npz": "neither mu and sigma nor arr_0",
        "large.npz": "images of 12×12, the samples have 6×6",
        "empty": "neither images.safetensors nor pictures",
        "none.npz": "an ADM .npz, a folder of images, or a data folder is needed",
    }
    for name, words in cases.items():
        with pytest.raises(UserError) as error:
            scores.read_reference(tmp_path / name, network, SHAPE)
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose weights of Inception are nowhere."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return make_run(tmp_path)


def real_images(folder):
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randint(0, 256, (n, 3, 8, 8), generator=generator).byte() for name, n in SPLITS.items()}
    labels = {f"{name}_labels": torch.arange(n) % 5 for name, n in SPLITS.items()}
    save_file(images | labels, folder / "images.safetensors")


SPLITS = {"train": 100, "test": 80}


def test_missing_weights_say_what_to_pass(run):
    with pytest.raises(UserError, match=r"no Inception weights, .* pass --inception FILE \(weights-inception"):
        evaluate.main([str(run)])
    with pytest.raises(UserError, match=r"--features inception: no weights: pass --inception FILE"):
        evaluate.main([str(run), "--features", "inception"])
    with pytest.raises(UserError, match=r"--reference: none given"):
        evaluate.main([str(run), "--inception", "w.pth"])


def test_missing_real_images_name_the_command_that_writes_them(run, tmp_path):
    """Wherever they are missed; the command and its arguments are real ones."""
    network, data = small_projection(), tmp_path / "data"
    for missed in (
        lambda: evaluate.main([str(run)]),
        lambda: evaluate.main([str(run), "--inception", "w.pth"]),
        lambda: read_images(data),
        lambda: scores.read_reference(data, network, (8, 8, 3)),
    ):
        with pytest.raises(UserError) as error:
            missed()
        (found,) = re.findall(r"st-fast (\S+) SOURCE (\S+) writes it", str(error.value))
        assert found == ("real-images", str(data)) and "\n" not in str(error.value)
    given = module_of("real-images").parser().parse_args(["pictures", str(data)])
    assert given.data == data


def test_too_few_samples_and_empty_classes_are_told_before_anything_slow(run, tmp_path):
    real_images(tmp_path / "data")
    with pytest.raises(UserError, match=r"--num 8: .* 8 features needs at least 9 samples"):
        evaluate.main([str(run), "--inception", "w.pth", "-n", "8"])
    with pytest.raises(UserError, match=r"none of 70 has class 1, 2, 4 \(3 of 5 are empty\)"):
        evaluate.main([str(run), "-n", "70", "--labels", "0,3"])


@pytest.mark.parametrize(
    ("splits", "asked", "told"),
    [
        ({"train": 100, "test": 16}, ["-n", "70"], r"images\.safetensors: 16 images in 'test': .* at least 65 images"),
        ({"train": 64, "test": 80}, ["-n", "70"], r"images\.safetensors: 64 images in 'train': .* at least 65 images"),
        ({"train": 65, "test": 65}, ["-n", "40"], r"--num 40: the classifier's 64 features need at least 65"),
        ({"train": 65, "test": 65}, ["--samples", "FILE"], r"few\.npz: 64 samples: .* 64 features need at least 65"),
    ],
)
def test_too_few_images_for_the_classifier_are_told_before_it_is_trained(
    splits, asked, told, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("st_fast.evaluate.classifier.train", pytest.fail)
    monkeypatch.setattr("st_fast.evaluate.__main__.draw_set", pytest.fail)
    monkeypatch.setitem(globals(), "SPLITS", splits)
    real_images(tmp_path / "data")
    few = npz(tmp_path / "few.npz", pictures(1, 64))
    with pytest.raises(UserError, match=told) as error:
        evaluate.main([str(run), *(str(few) if word == "FILE" else word for word in asked)])
    assert "\n" not in str(error.value)


def test_with_weights_it_draws_scores_prints_the_protocol_and_keeps_a_record(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inception, "load_inception", lambda path, device: small_projection())
    real_images(tmp_path / "data")
    evaluate.main([str(run), "--inception", "w.pth", "-n", "20"])
    out = capsys.readouterr().out
    how, *lines = out[out.index("N = ") :].splitlines()
    for part in ("N = 20", "reference data", "TensorFlow 1 to 299", "pool3", "weights 555555555555"):
        assert part in how and out.count(part) == 1, "the protocol is said once"
    named = [line.split()[0] for line in lines if re.fullmatch(r"\w+ [\d.e+-]+", line)]
    assert named == [
        "fid", "sfid", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall"
    ]  # fmt: skip
    record = json.loads((run / "plain" / "samples" / "20-heun3-cfg2" / "metrics.json").read_text())
    assert (record["kind"], record["stage"], record["step"]) == ("metrics", "plain", 10)
    assert record["protocol"]["num"] == 20 and record["samples"]["cfg_scale"] == 2.0
    assert record["metrics"]["fid"] > 0


def test_another_projects_file_is_scored_in_one_command(tmp_path, monkeypatch, capsys):
    """Drawn and scored without a run, a data folder or a recipe; with data, by the classifier as well."""
    monkeypatch.setattr(inception, "load_inception", lambda path, device: small_projection())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    config = Model(depth=2, width=32, heads=2, patch=2, channels=3, latent_size=8, num_classes=5)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save({"ema": foreign.trunk(config, 1), "args": {"prediction": "v", "num_classes": 5}}, "../0400000.pt")
    reference = npz(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    model = ["../0400000.pt", "--heads", "2", "--vae", "pixels", "-n", "20", "--preset", "unguided", "--steps", "2"]
    evaluate.main([*model, "--inception", "w.pth", "--reference", str(reference)])
    folder = Path("samples/0400000-20-sde2-cfg1")
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"]["fid"] > 0 and record["protocol"]["num"] == 20
    assert (record["stage"], record["samples"]["sampler"], record["samples"]["num_classes"]) == ("0400000", "sde", 5)
    found = scores.score(
        open_npz(folder / "samples.npz"), network := small_projection(),
        scores.read_reference(reference, network, (8, 8, 3)),
    )  # fmt: skip
    assert record["metrics"]["fid"] == pytest.approx(found["fid"])
    sample.main([*model, "--npz"])
    assert "complete already" in capsys.readouterr().out, "the very set that sample draws"
    with pytest.raises(UserError, match=r"--reference: none given, and \.\./0400000.pt comes without data; pass ADM's"):
        evaluate.main([*model, "--inception", "w.pth"])
    with pytest.raises(UserError, match=r"for a classifier \.\./0400000.pt comes without data \(--data\); or pass"):
        evaluate.main(model)
    drawn = shutil.copy(folder / "samples.npz", tmp_path / "drawn.npz")
    told = ["--inception", "w.pth", "--reference", str(reference)]
    evaluate.main([*model[:3], "--samples", str(drawn), *told])  # without a VAE: nothing is drawn
    assert json.loads((tmp_path / "drawn.metrics.json").read_text())["metrics"]["fid"] == record["metrics"]["fid"]
    make_run(tmp_path)
    real_images(tmp_path / "data")
    evaluate.main([*model[:3], "-n", "70", "--preset", "unguided", "--steps", "2", "--data", str(tmp_path / "data")])
    record = json.loads(Path("samples/0400000-70-sde2-cfg1/metrics.json").read_text())
    assert "classifier_frechet" in record["metrics"] and record["samples"]["vae"].startswith("pixels")


def small_projection():
    network = Projection()
    network.weights = [np.tile(w, (2, 1))[:192] for w in network.weights]  # 8×8 pixels
    return network


def test_without_weights_the_classifier_scores_and_nothing_is_called_fid(run, tmp_path, capsys):
    real_images(tmp_path / "data")
    evaluate.main([str(run), "-n", "70"])
    out = capsys.readouterr().out
    assert out.count("not FID") == 1
    record = json.loads((run / "plain" / "samples" / "70-heun3-cfg2" / "metrics.json").read_text())
    numbers, real, names = record["metrics"], record["real_images"], ("accuracy", "frechet", "precision", "recall")
    assert set(numbers) == {"accuracy", "accuracy_per_class", *(f"classifier_{name}" for name in names[1:])}
    assert set(real) == set(names) and record["protocol"]["real_images"] == SPLITS["test"]
    of_samples, of_real = out.split(f"the same of {SPLITS['test']} held-out real images")
    assert all(f"\n{name} {numbers[name]:.5g}\n" in of_samples for name in numbers if name != "accuracy_per_class")
    assert all(f"\nreal_{name} {real[name]:.5g}\n" in of_real for name in names)
    kept = json.loads((tmp_path / "data" / "classifier" / "manifest.json").read_text())
    assert real["accuracy"] == kept["accuracy"] and record["protocol"]["weights_sha256"] == kept["model_sha256"]


def test_another_protocol_and_other_weights_have_places_of_their_own(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inception, "load_inception", lambda path, device: small_projection())
    real_images(tmp_path / "data")
    samples, by_inception = run / "plain" / "samples", ["--inception", "w.pth"]

    def scored(*flags):
        evaluate.main([str(run), "-n", "70", *flags])
        path = Path(capsys.readouterr().out.splitlines()[-1])
        return path, json.loads(path.read_text())

    first, record = scored()
    assert first == samples / "70-heun3-cfg2" / "metrics.json"
    second, other = scored(*by_inception)
    assert second.parent == first.parent and second.name.startswith("metrics-"), "the same samples, other features"
    assert scored()[0] == first and scored(*by_inception)[0] == second and json.loads(first.read_text()) == record
    assert other["samples"] == record["samples"] and other["protocol"] != record["protocol"]
    raw, _ = scored("--weights", "raw", "--seed", "8")
    assert raw.parent.name.startswith("70-heun3-cfg2-raw-step10-seed8-") and raw.name == "metrics.json"
    make_run(tmp_path, seed=1, step=20)
    trained_on, later = scored()
    assert trained_on.parent.name.startswith("70-heun3-cfg2-ema-step20-seed3-") and later["step"] == 20
    assert json.loads(first.read_text()) == record and record["step"] == 10
    assert later["metrics"]["classifier_frechet"] != record["metrics"]["classifier_frechet"]
    assert scored()[0] == trained_on


def test_samples_that_are_drawn_are_scored_where_the_runs_weights_are_not(run, tmp_path, capsys):
    """As a run that was brought home from another machine."""
    real_images(tmp_path / "data")
    evaluate.main([str(run), "-n", "70"])
    drawn = shutil.copy(run / "plain" / "samples" / "70-heun3-cfg2" / "samples.npz", tmp_path / "drawn.npz")
    there = json.loads((run / "plain" / "samples" / "70-heun3-cfg2" / "metrics.json").read_text())
    shutil.rmtree(run / "plain")
    evaluate.main([str(run), "--samples", str(drawn), "--features", "classifier"])
    here = json.loads((tmp_path / "drawn.metrics.json").read_text())
    assert here["metrics"] == there["metrics"] and here["real_images"] == there["real_images"]


def test_samples_that_another_run_drew_are_not_scored_as_this_ones(run, tmp_path, monkeypatch, capsys):
    """Copied over, or edited; a set of an older version, which has no SHA-256, is taken."""
    monkeypatch.setattr(inception, "load_inception", lambda path, device: small_projection())
    real_images(tmp_path / "data")
    drawing, folder = [str(run), "-n", "20"], run / "plain" / "samples" / "20-heun3-cfg2"
    asked = [*drawing, "--inception", "w.pth"]
    evaluate.main(asked)
    own, settings = (folder / "samples.npz").read_bytes(), json.loads((folder / "sample.json").read_text())
    assert settings["samples_sha256"] == hashlib.sha256(own).hexdigest()
    assert "samples_sha256" not in json.loads((folder / "metrics.json").read_text())["samples"], "it is no setting"
    others = npz(tmp_path / "others.npz", np.zeros((20, 8, 8, 3), np.uint8)).read_bytes()
    for again in (lambda: evaluate.main(asked), lambda: sample.main([*drawing, "--npz"])):
        (folder / "samples.npz").write_bytes(others)
        with pytest.raises(
            UserError, match=r"samples\.npz: SHA-256 .* not the samples .* remove it, and the same"
        ) as told:
            again()
        assert told.value.exit_code == 2 and "\n" not in str(told.value)
        (folder / "samples.npz").unlink()
        again()
        assert (folder / "samples.npz").read_bytes() == own
        assert json.loads((folder / "sample.json").read_text()) == settings
    (folder / "samples.npz").write_bytes(others)
    del settings["samples_sha256"]
    (folder / "sample.json").write_text(json.dumps(settings))
    capsys.readouterr()
    again()
    assert "complete already" in capsys.readouterr().out

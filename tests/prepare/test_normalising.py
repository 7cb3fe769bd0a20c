"""How latents are normalised: what the options say, what a VAE leaves open, and what can't be."""

from __future__ import annotations

import io
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from st_fast.core.errors import UserError
from st_fast.core.latents import Normalisation
from st_fast.data.manifest import read_manifest
from st_fast.data.shards import open_data
from st_fast.data.source import Source
from st_fast.data.statistics import latent_statistics
from st_fast.model.autoencoders import Posterior
from st_fast.model.vae import load_vae, vae_hash
from st_fast.prepare import normalising
from st_fast.prepare.encode import Latents
from st_fast.prepare.normalising import latents_of, measured, read_stats
from tests.autoencoders import COUNT, SIDE, dc_ae, e2e, flux1, ldm_table, rae, sd, va_vae, write_images

from .conftest import run


@pytest.fixture
def images(tmp_path: Path) -> torch.Tensor:
    return write_images(tmp_path / "images")


def prepare(tmp_path: Path, out: str, vae: Path, *options: object) -> None:
    settings = ["--vae", vae, "--size", SIDE, "--device", "cpu", "--dtype", "float32"]
    run(tmp_path / "images", tmp_path / out, *settings, *options)


def test_a_vae_that_says_nothing_of_its_latents_is_refused_until_the_options_do(
    images: torch.Tensor, tmp_path: Path
) -> None:
    file = va_vae(tmp_path / "vae", images)
    with pytest.raises(UserError, match=r"nothing says how its latents are normalised.*--latents-stats.*--scale"):
        prepare(tmp_path, "none", file)
    prepare(tmp_path, "scaled", file, "--scale", 1)
    prepare(tmp_path, "file", file, "--latents-stats", tmp_path / "vae" / "latents_stats.pt")
    raw, normal = (open_data(tmp_path / out).gather(np.arange(COUNT))[0] for out in ("scaled", "file"))
    stats = torch.load(tmp_path / "vae" / "latents_stats.pt")
    assert torch.allclose(normal[:, :6], (raw[:, :6] - stats["mean"]) / stats["std"], atol=1e-5)
    assert torch.allclose(normal[:, 6:], raw[:, 6:] / stats["std"], atol=1e-6)
    assert read_manifest(tmp_path / "file").latents_std == pytest.approx(stats["std"].reshape(-1).tolist())


def test_measured_statistics_normalise_each_channel_and_are_kept(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = va_vae(tmp_path / "vae", images)
    prepare(tmp_path, "out", file, "--latents-stats", "auto")
    looks = latent_statistics(open_data(tmp_path / "out"), np.arange(COUNT))
    assert np.abs(looks.mean).max() < 1e-4 and np.abs(looks.std - 1).max() < 1e-4
    kept = json.loads((tmp_path / "out" / "latents_stats.json").read_text())
    assert kept["latents_mean"] == list(read_manifest(tmp_path / "out").latents_mean)
    prepare(tmp_path, "out", file, "--latents-stats", "auto")  # says that it is complete
    monkeypatch.setattr("st_fast.prepare.normalising.rank_count", lambda: 2)
    with pytest.raises(UserError, match="by one process"):
        prepare(tmp_path, "two", file, "--latents-stats", "auto")


def test_statistics_are_measured_of_what_a_step_sees(images: torch.Tensor, tmp_path: Path) -> None:
    """Of drawn latents with the posteriors' own spread, which is more than half here, of means alone without."""
    file = va_vae(tmp_path / "vae", images)
    for posterior in ("sample", "mean"):
        prepare(tmp_path, posterior, file, "--latents-stats", "auto", "--posterior", posterior)
        seen = open_data(tmp_path / posterior).gather(np.arange(COUNT))[0].double().numpy()
        mean, own = seen[:, :6], (seen[:, 6:] ** 2 if posterior == "sample" else np.zeros(()))
        assert np.abs(mean.mean((0, 2, 3))).max() < 1e-4
        assert np.abs(mean.var((0, 2, 3)) + own.mean((0, 2, 3) if own.ndim else None) - 1).max() < 1e-4
        assert mean.var() < 0.9 or posterior == "mean"


class Plain:
    """A VAE of one line, taken for an AutoencoderKL: mean 2x + 1 and std |x| + ½ of every pixel x."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(in_channels=3, latent_channels=3, block_out_channels=(4,), scaling_factor=0.25)

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=2 * x + 1, std=x.abs() + 0.5))


def shuffled(side: int = 6, count: int = 13) -> tuple[np.ndarray, Source]:
    """Pictures uint8 (n, side, side, 3), darker from channel to channel, and a source of them."""
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (count, side, side, 3)) // np.array([1, 2, 4])
    files = []
    for one in pictures:
        Image.fromarray(one.astype(np.uint8)).save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    names = [f"{number}.png" for number in range(count)]
    return pictures, Source("pictures", names, np.zeros(count, np.int64), 1, (), lambda number: files[number])


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_statistics_are_measured_in_float64_over_evenly_spaced_images(
    posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 13 images numbers 0, 3, 6, 9 and 12, in batches of two, without number 9, which is none."""
    monkeypatch.setattr(normalising, "MEASURED", 5)
    monkeypatch.setattr(normalising, "BATCH", 2)
    pictures, source = shuffled()
    asked: list[int] = []

    def read(number: int) -> bytes:
        asked.append(number)
        return b"none" if number == 9 else source.read(number)

    args = Namespace(size=6, vae="plain")
    found = measured(args, Plain(), replace(source, read=read), tmp_path / "out", posterior)
    assert asked == [0, 3, 6, 9, 12]
    x = pictures[[0, 3, 6, 12]] / 127.5 - 1
    mean, own = 2 * x + 1, (np.abs(x) + 0.5) ** 2 * (posterior == "sample")
    np.testing.assert_allclose(found.latents_mean, mean.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.latents_std, np.sqrt(mean.var((0, 1, 2)) + own.mean((0, 1, 2))), rtol=1e-6)
    assert (found.scale, found.shift) == (1.0, 0.0)
    assert measured(args, Plain(), replace(source, read=pytest.fail), tmp_path / "out", posterior) == found


def test_what_can_not_be_measured_is_told(tmp_path: Path) -> None:
    args, (_, source) = Namespace(size=6, vae="plain"), shuffled()
    with pytest.raises(UserError, match="pictures: not one usable image"):
        measured(args, Plain(), replace(source, read=lambda number: b"none"), tmp_path / "out", "mean")
    white = io.BytesIO()
    Image.new("RGB", (6, 6), "white").save(white, "PNG")
    with pytest.raises(UserError, match=r"--latents-stats auto: latents_std = 0\.0: a positive number"):
        measured(args, Plain(), replace(source, read=lambda number: white.getvalue()), tmp_path / "out", "mean")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Latents(Normalisation(0.25, 0.0), "sample")),
        ({"posterior": "mean"}, Latents(Normalisation(0.25, 0.0), "mean")),
        ({"scale": 0.5}, Latents(Normalisation(0.5, 0.0), "sample")),
        ({"latents_stats": "stats.json"}, Latents(Normalisation(1.0, 0.0, (1.0, 2.0, 4.0), (0.5, 3.0, 2.0)), "sample")),
        (
            {"latents_stats": "stats.json", "scale": 0.5},
            Latents(Normalisation(0.5, 0.0, (1.0, 2.0, 4.0), (0.5, 3.0, 2.0)), "sample"),
        ),
    ],
)
def test_latents_are_the_vaes_or_what_the_options_make_of_them(
    options: dict[str, object], expected: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stats.json").write_text(json.dumps({"mean": [1, 2, 4], "var": [0.25, 9, 4]}))
    args = Namespace(**{"vae": "plain", "posterior": "auto", "latents_stats": None, "scale": None, **options})
    assert latents_of(args, Plain(), shuffled()[1], tmp_path / "out") == expected


def test_a_scale_of_1_has_to_be_asked_for_where_nothing_says_one(tmp_path: Path) -> None:
    vae, source = Plain(), shuffled()[1]
    vae.config = SimpleNamespace(**{**vars(Plain.config), "scaling_factor": 1.0})
    args = Namespace(vae="plain", posterior="mean", latents_stats=None, scale=None)
    with pytest.raises(UserError, match="nothing says how its latents are normalised"):
        latents_of(args, vae, source, tmp_path / "out")
    args.scale = 1.0
    assert latents_of(args, vae, source, tmp_path / "out") == Latents(Normalisation(1.0, 0.0), "mean")


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_statistics_are_read_from_other_files_too(images: torch.Tensor, tmp_path: Path, ending: str) -> None:
    file = va_vae(tmp_path / "vae", images)
    mean, var = torch.arange(6.0) - 2, torch.arange(6.0) + 0.5
    stats = tmp_path / f"stats.{ending}"
    if ending == "json":
        stats.write_text(json.dumps({"latents_mean": mean.tolist(), "latents_std": var.sqrt().tolist()}))
    else:
        save_file({"mean": mean.view(6, 1, 1), "var": var.view(6, 1, 1)}, stats)
    prepare(tmp_path, "out", file, "--latents-stats", stats, "--scale", 0.5)
    made = read_manifest(tmp_path / "out")
    assert made.scale == 0.5 and made.latents_mean == tuple(mean.tolist())
    assert made.latents_std == pytest.approx(var.sqrt().tolist())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mean": [0.0] * 5, "std": [1.0] * 5}, "latents_mean has 5 numbers; the latents have 6 channels"),
        ({"mean": [0.0] * 6, "std": [1.0] * 5 + [0.0]}, "latents_std = 0.0: a positive number"),
        ({"mean": [0.0] * 6, "var": [1.0] * 5 + [-1.0]}, "var = -1.0: a positive number"),
        ({"mean": [0.0] * 6, "var": [1.0] * 5 + [0.0]}, "var = 0.0: a positive number"),
        ({"mean": [], "std": [1.0] * 6}, "no numbers; the latents have 6 channels"),
        ({"mean": [0.0] * 6, "std": []}, "no numbers; the latents have 6 channels"),
        ({"mean": [0.0] * 6, "latents_mean": [1.0] * 6, "std": [1.0] * 6}, "has both latents_mean and mean"),
        ({"mean": [0.0] * 6}, "has .*mean.*; mean, and std or var"),
        ({"mean": [0.0] * 6, "std": [1.0] * 6, "var": [1.0] * 6}, "mean, and std or var"),
        ({"mean": [[0.0] * 3] * 2, "std": [1.0] * 6}, r"statistics of shape \(2, 3\); one number a channel"),
        ({"mean": [0.0] * 6, "std": 1.0}, r"statistics of shape \(\); one number a channel"),
        ({"mean": ["a"] * 6, "std": [1.0] * 6}, "could not convert"),
        ({"mean": [2e4] * 6, "std": [1.0] * 6}, "latents_mean = 20000.0: a number, at most"),
    ],
)
def test_statistics_that_can_not_be_are_refused(
    images: torch.Tensor, tmp_path: Path, content: dict[str, object], words: str
) -> None:
    (tmp_path / "stats.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, "out", va_vae(tmp_path / "vae", images), "--latents-stats", tmp_path / "stats.json")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_file_of_statistics_that_is_cut_off_is_named(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(6), "std": torch.ones(6)}, whole := tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-4])
    assert read_stats(whole, 6).latents_std == (1.0,) * 6
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        read_stats(tmp_path / "cut.safetensors", 6)


@pytest.mark.filterwarnings("error")
def test_what_float16_can_not_hold_is_told_before_it_is_written(images: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(json.dumps({"mean": [0.0] * 6, "std": [1e-7] * 6}))
    file = va_vae(tmp_path / "vae", images)
    with pytest.raises(UserError, match=r"NaN or Inf; float16 holds 65,504 at most.*too small a std"):
        prepare(tmp_path, "out", file, "--latents-stats", tmp_path / "stats.json", "--dtype", "float16")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_mean_alone_takes_half_of_the_space(images: torch.Tensor, tmp_path: Path) -> None:
    vae = flux1(tmp_path / "vae", images)
    prepare(tmp_path, "both", vae)
    prepare(tmp_path, "mean", vae, "--posterior", "mean")
    both, mean = (open_data(tmp_path / out) for out in ("both", "mean"))
    assert mean.manifest.shape == (16, 8, 8) and both.manifest.shape == (32, 8, 8)
    assert torch.equal(mean.gather(np.arange(COUNT))[0], both.gather(np.arange(COUNT))[0][:, :16])
    assert latent_statistics(mean, np.arange(COUNT)).posterior.max() == 0
    with pytest.raises(UserError, match=r"--posterior sample: .* allowed: mean"):
        prepare(tmp_path, "none", dc_ae(tmp_path / "dc", images), "--posterior", "sample")


def test_a_finished_or_begun_set_is_not_continued_with_another_normalisation(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = flux1(tmp_path / "vae", images)
    prepare(tmp_path, "out", vae)
    prepare(tmp_path, "out", vae, "--posterior", "sample")
    for options in (("--scale", 0.5), ("--posterior", "mean"), ("--latents-stats", "auto")):
        with pytest.raises(UserError, match="complete, but made with"):
            prepare(tmp_path, "out", vae, *options)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="begun with normalisation"):
        prepare(tmp_path, "out", vae, "--scale", 0.5)
    with pytest.raises(UserError, match="begun with posterior"):
        prepare(tmp_path, "out", vae, "--posterior", "mean")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scale", 0.5), r"made with scale 0\.5 \(\d"),
        (("--posterior", "mean"), r"made with posterior mean \(sample\)"),
        (("--latents-stats", "auto", "--scale", 1), "made with .*latents_mean"),
    ],
)
def test_a_finished_set_is_not_said_to_be_what_the_command_without_its_options_makes(
    images: torch.Tensor, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    vae = flux1(tmp_path / "vae", images)
    prepare(tmp_path, "out", vae, *options)
    prepare(tmp_path, "out", vae, *options)
    with pytest.raises(UserError, match=f"complete, but {words}"):
        prepare(tmp_path, "out", vae)


@pytest.fixture
def hub(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """owner/flux with the variant fp16 is on the hub; the list is of what was asked of it."""
    folder, asked = flux1(tmp_path / "hub", images), list[object]()

    def load(name: str | Path, *rest: object, variant: str | None = None) -> object:
        if str(name) != "owner/flux":
            return load_vae(name, *rest, variant=variant)  # type: ignore[arg-type]
        asked.append(name)
        vae = load_vae(folder)
        if variant or (rest and rest[-1] == "fp16"):
            vae.encoder.conv_in.weight.data.mul_(1.25)
        return vae

    for module in ("commands", "vaes"):
        monkeypatch.setattr(f"st_fast.prepare.{module}.load_vae", load)
    return asked


HUB = Path("owner/flux")


@pytest.mark.parametrize("buckets", [(), ("--buckets", "1:1,2:1")])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scale", 0.5), r"scale 0\.5 \(\d"),
        (("--posterior", "mean"), r"posterior mean \(sample\)"),
        (("--latents-stats", "auto", "--scale", 1), "scale .*latents_mean"),
        (("--vae-variant", "fp16"), r"vae_variant fp16 \(now None\)"),
    ],
)
def test_a_finished_set_of_a_hub_name_is_compared_without_the_hub(
    options: tuple[object, ...], words: str, buckets: tuple[str, ...], hub: list[object], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prepare(tmp_path, "out", HUB, *buckets, *options)
    prepare(tmp_path, "usual", HUB, *buckets)
    hub.clear()
    for out, same in (("out", options), ("usual", ())):
        capsys.readouterr()
        prepare(tmp_path, out, HUB, *buckets, *same)
        assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"complete, but made with {words}"):
        prepare(tmp_path, "out", HUB, *buckets)
    with pytest.raises(UserError, match="complete, but made with"):
        prepare(tmp_path, "usual", HUB, *buckets, *options)
    assert not hub


def test_a_finished_set_of_a_file_is_compared_with_the_file(
    images: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = va_vae(tmp_path / "vae", images)
    stats, scale = ("--latents-stats", tmp_path / "vae" / "latents_stats.pt"), ("--scale", 0.5)
    refused = {
        stats: {(): r"latents_mean [\d.-]+ \(0\), latents_std", scale: r"scale 1 \(0\.5\), latents_mean"},
        (*scale, "--posterior", "mean"): {(): r"scale 0\.5 \(1\), posterior mean \(sample\)", scale: "posterior mean"},
    }
    for made, others in refused.items():
        for _ in range(2):
            prepare(tmp_path, made[0], file, *made)
        assert "complete already" in capsys.readouterr().out
        for options, words in others.items():
            with pytest.raises(UserError, match=rf"complete, but made with {words}"):
                prepare(tmp_path, made[0], file, *options)
    torch.save({"state_dict": ldm_table(seed=5)}, file)
    with pytest.raises(UserError, match=r"another VAE than .*: its weights changed"):
        prepare(tmp_path, stats[0], file, *stats)


def test_a_finished_set_of_a_small_vae_is_compared_with_what_it_says(images: torch.Tensor, tmp_path: Path) -> None:
    small = ("--vae-steps", 1, "--scale", 0.5)
    prepare(tmp_path, "out", Path("small"), *small)
    prepare(tmp_path, "out", Path("small"), *small)
    with pytest.raises(UserError, match=r"complete, but made with scale 0\.5 \(\d"):
        prepare(tmp_path, "out", Path("small"), *small[:2])


def test_a_damaged_note_of_what_a_vae_says_is_told(hub: list[object], tmp_path: Path) -> None:
    prepare(tmp_path, "out", HUB)
    path = tmp_path / "out" / "job.json"
    job = json.loads(path.read_text())
    for told in (3, {"posterior": "sample"}, {"normalisation": {"scale": "x"}}, {"normalisation": {}, "posterior": 1}):
        path.write_text(json.dumps(job | {"vae_own": told}))
        with pytest.raises(UserError, match=r"job\.json: vae_own"):
            prepare(tmp_path, "out", HUB)
    del job["vae_own"]
    path.write_text(json.dumps(job))  # of an older version
    prepare(tmp_path, "out", HUB)


def test_a_set_with_measured_statistics_is_not_one_with_a_scale_on_them(images: torch.Tensor, tmp_path: Path) -> None:
    vae = e2e(tmp_path / "vae", images)
    prepare(tmp_path, "out", vae, "--latents-stats", "auto", "--scale", 0.5)
    with pytest.raises(UserError, match=r"complete, but made with scale 0\.5 \(1\)"):
        prepare(tmp_path, "out", vae, "--latents-stats", "auto")


def test_names_that_have_no_weights_have_no_variants(images: torch.Tensor, tmp_path: Path) -> None:
    for name in ("pixels", "small"):
        with pytest.raises(UserError, match=f"--vae-variant fp16: --vae {name} has no variants"):
            prepare(tmp_path, "out", Path(name), "--vae-variant", "fp16")
    assert not (tmp_path / "out").exists()
    prepare(tmp_path, "out", Path("pixels"))
    with pytest.raises(UserError, match="--vae-variant fp16: --vae pixels has no variants"):
        prepare(tmp_path, "out", Path("pixels"), "--vae-variant", "fp16")


def test_sizes_that_an_autoencoder_can_not_encode_are_refused(images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size = 32: .* images of 32 × 32|size = 40: .* images of 32 × 32"):
        run(tmp_path / "images", tmp_path / "out", "--vae", rae(tmp_path / "rae", images), "--size", 40)
    with pytest.raises(UserError, match="size = 34: the VAE reduces by 4"):
        run(tmp_path / "images", tmp_path / "out", "--vae", dc_ae(tmp_path / "dc", images), "--size", 34)


def test_a_pipelines_folder_and_its_only_variant_are_found(images: torch.Tensor, tmp_path: Path) -> None:
    pipeline = sd(tmp_path / "pipeline", images)
    prepare(tmp_path, "out", pipeline)
    made = read_manifest(tmp_path / "out").vae
    assert (made.name, made.kind, made.factor, made.path) == ("pipeline", "AutoencoderKL", 4, "vae")
    prepare(tmp_path, "same", pipeline / "vae", "--vae-variant", "fp16")
    assert read_manifest(tmp_path / "same").vae.hash == made.hash
    weights = next((pipeline / "vae").glob("*.fp16.safetensors"))
    shutil.copy(weights, weights.with_name(weights.name.replace("fp16", "ema")))
    with pytest.raises(UserError, match=r"it has the variants ema, fp16|it has the variants 'ema', 'fp16'"):
        prepare(tmp_path, "none", pipeline)
    with pytest.raises(UserError, match="neither a folder with an autoencoder"):
        prepare(tmp_path, "none", pipeline, "--vae-variant", "other")


def test_a_class_that_is_not_known_is_named(images: torch.Tensor, tmp_path: Path) -> None:
    vae = e2e(tmp_path / "vae", images)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match=r"_class_name = 'VQModel'; known are AutoencoderKL, "):
        prepare(tmp_path, "out", vae)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("encoder.mid.block_1.conv1.bias"), "encoder.mid_block.resnets.0.conv1.bias"),
        (lambda t: t.update({"decoder.up.1.block.0.norm1.weight": torch.ones(32)}), "norm1.weight"),
        (lambda t: t.pop("decoder.conv_in.weight"), "no VAE of latent diffusion's layout"),
        (lambda t: t.update({"encoder.down.9.block.0.norm1.weight": torch.ones(32)}), "0, 1, … are needed"),
        (lambda t: t.update({"quant_conv.weight": torch.zeros(8, 12, 1, 1)}), "quant_conv gives 8 channels"),
        (lambda t: t.update({"encoder.down.0.block.0.conv1.weight": torch.zeros(30, 32, 3, 3)}), "multiples of 32"),
        (lambda t: t.update({"encoder.conv_in.weight": torch.full((32, 3, 3, 3), torch.nan)}), "NaN"),
    ],
)
def test_a_file_that_is_no_vae_is_told_in_one_line(
    images: torch.Tensor, tmp_path: Path, change: object, words: str
) -> None:
    table = ldm_table()
    change(table)  # type: ignore[operator]
    torch.save(table, tmp_path / "vae.ckpt")
    with pytest.raises(UserError, match=words) as caught:
        prepare(tmp_path, "out", tmp_path / "vae.ckpt", "--scale", 1)
    assert "\n" not in str(caught.value)


def test_a_hub_name_may_be_a_pipelines(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd(tmp_path / "owner" / "pipeline", images)
    monkeypatch.chdir(tmp_path / "owner")
    asked: list[tuple[str, str | None]] = []
    given = diffusers.AutoencoderKL.load_config

    def load_config(name: str, subfolder: str | None = None, **more: object) -> object:
        asked.append((name, subfolder))
        if subfolder is None:
            raise OSError(f"{name} does not appear to have a file named config.json.")
        return given(tmp_path / name, subfolder=subfolder)

    own = diffusers.AutoencoderKL.from_pretrained

    def from_pretrained(name: str, **more: object) -> object:
        monkeypatch.setattr("diffusers.AutoencoderKL.load_config", given)  # which it calls itself
        return own(tmp_path / name, **more)

    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", load_config)
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", from_pretrained)
    monkeypatch.setattr("st_fast.model.vae.answers", lambda address: None)
    vae = load_vae("owner/pipeline", variant="fp16")
    assert asked[:2] == [("owner/pipeline", None), ("owner/pipeline", "vae")]
    assert vae_hash(vae) == vae_hash(load_vae(tmp_path / "owner" / "pipeline"))

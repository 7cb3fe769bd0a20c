"""Latents of one kind are never taken for another's: by the recipe, a teacher, a decoder, or the data's own VAE."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from st_fast.convert import __main__ as convert
from st_fast.core.errors import UserError
from st_fast.core.latents import LatentSpace, Normalisation
from st_fast.data.manifest import Manifest, VaeInfo, read_manifest, write_manifest
from st_fast.data.shards import open_data
from st_fast.data.statistics import latent_statistics, sampled_warning
from st_fast.model.load import latents_as_json, read_config
from st_fast.model.vae import load_vae, tensors_hash, vae_hash
from st_fast.prepare.small_vae import SmallVae, new_vae
from st_fast.prepare.writing import write_shards
from st_fast.recipe import load
from st_fast.sample import __main__ as sample
from st_fast.sample.model import decoder
from st_fast.train.run import run
from tests.tiny import records, write_recipe

CPU = torch.device("cpu")


def latents(folder: Path, name: str = "mine", seed: int = 0, **more: object) -> Path:
    """A set of random latents with a VAE of its own, f = 2."""
    torch.manual_seed(seed)
    vae = new_vae(SmallVae((4, 4), 0), 3, 8)
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    generator = torch.Generator().manual_seed(1)
    moments = 2 * torch.randn(30, 8, 4, 4, generator=generator)
    moments[:, 4:] = 0.1
    info = VaeInfo(name, vae_hash(load_vae(folder / "vae")), "vae", "AutoencoderKL", 2)
    made = Manifest(0, (8, 4, 4), "float16", 0.5, info, "random", 5, shift=0.0)
    write_shards(folder, [(moments.half(), torch.arange(30) % 5)], replace(made, **more), shard_size=16)
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """Data and the run folder of one stage trained on it."""
    torch.set_num_threads(1)
    data = latents(tmp_path / "data")
    recipe = write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    run(load(recipe, ["--sample.num=4", "--sample.sampler=euler", "--sample.steps=2"]))
    return data, tmp_path / "out"


def student(tmp_path: Path, data: Path, teacher: Path) -> object:
    """A recipe of a second stage alone, for these data."""
    recipe = write_recipe(tmp_path / "student.toml", data, tmp_path / "student")
    text = recipe.read_text()
    first, second = text.index("[[stage]]"), text.rindex("[[stage]]")
    recipe.write_text(text[:first] + text[second:].replace('teacher = "align"', f'teacher = "{teacher}"'))
    return load(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "other", "seed": 5}, r"VAE mine, [0-9a-f]{12} \(other, [0-9a-f]{12}\)"),
        ({"scale": 0.25}, r"scale 0\.5 \(0\.25\)"),
        ({"shift": 0.5}, r"shift 0 \(0\.5\)"),
        ({"latents_mean": (0.0, 0.0, 0.5, 0.0)}, r"latents_mean 0 \(0\.5\)"),
        ({"latents_std": (1.0, 2.0, 1.0, 1.0)}, r"latents_std 1 \(2\)"),
    ],
)
def test_a_teacher_of_other_latents_is_refused_by_name(
    trained: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    _, out = trained
    other = latents(tmp_path / "other", **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"teacher .*trained on other latents than the data's: {words}"):
        run(student(tmp_path, other, out / "align"))
    assert not (tmp_path / "student" / "recipe.toml").exists()
    same = latents(tmp_path / "same")
    run(student(tmp_path, same, out / "align"))


def test_a_teacher_of_an_older_version_which_does_not_tell_is_taken(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = trained
    monkeypatch.setattr("st_fast.model.stored.latent_space", lambda meta, where: None)
    run(student(tmp_path, latents(tmp_path / "other", scale=0.25), out / "align"))
    assert records(tmp_path / "student", "train")[-1]["step"] == 10


def test_samples_are_not_decoded_by_data_of_other_latents(trained: tuple[Path, Path]) -> None:
    data, out = trained
    sample.main([str(out), "--num", "2"])
    write_manifest(data, replace(read_manifest(data), scale=0.25))
    with pytest.raises(UserError, match=r"other latents than the data's: scale 0\.5 \(0\.25\)"):
        sample.main([str(out), "--num", "2"])


def test_the_recipe_names_the_vae_of_its_data(tmp_path: Path) -> None:
    data = latents(tmp_path / "data")
    digest = read_manifest(data).vae.hash
    recipe = write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    for wrong in ("other", digest[:7], "0" * 64):
        with pytest.raises(
            UserError, match=rf"data\.vae = '{wrong}': the latents in .* are of 'mine', SHA-256 {digest}"
        ):
            run(load(recipe, [f"--data.vae={wrong}"]))
    for channels, size in ((8, 4), (4, 8)):
        with pytest.raises(UserError, match=r"latents are \(4, 4, 4\), model.channels = "):
            run(load(recipe, [f"--model.channels={channels}", f"--model.latent_size={size}"]))
    for right in ("mine", digest[:8], digest):
        run(load(recipe, [f"--data.vae={right}"]))


def test_the_datas_own_vae_must_have_the_weights_that_encoded_it(tmp_path: Path) -> None:
    data = latents(tmp_path / "data")
    manifest = read_manifest(data)
    decoder(data, manifest, CPU)
    shutil.rmtree(data / "vae")
    latents(tmp_path / "other", seed=5)
    shutil.copytree(tmp_path / "other" / "vae", data / "vae")
    with pytest.raises(
        UserError, match=rf"its VAE .*: its weights are .*, the latents were made with {manifest.vae.hash[:12]}"
    ):
        decoder(data, manifest, CPU)
    shutil.rmtree(data / "vae")  # nor is the hub asked for a model of that path
    with pytest.raises(UserError, match=r"data/vae: missing; the VAE 'mine', which encoded .*, was kept there"):
        decoder(data, manifest, CPU)


def test_weights_that_were_rounded_before_they_were_hashed_are_the_same(tmp_path: Path) -> None:
    data = latents(tmp_path / "data")
    rounded = load_vae(data / "vae").to(torch.bfloat16).state_dict()
    manifest = read_manifest(data)
    old = replace(manifest, vae=replace(manifest.vae, hash=tensors_hash(rounded)))
    assert old.vae.hash != manifest.vae.hash
    decoder(data, old, CPU)


@pytest.mark.parametrize(
    ("config", "widths", "channels", "words"),
    [
        ({"scaling_factor": 0.25}, (4, 4), 4, r"scale 0\.25 \(0\.5\)"),
        ({"scaling_factor": 0.5, "shift_factor": 1.0}, (4, 4), 4, r"shift 1 \(0\)"),
        ({"scaling_factor": 0.5}, (4, 4), 6, r"channels 6 \(4\)"),
        ({"scaling_factor": 0.5}, (4, 4, 4), 4, r"factor 4 \(2\)"),
        ({"scaling_factor": 0.5, "latents_std": [1.0, 2.0, 1.0, 1.0]}, (4, 4), 4, r"latents_std 2 \(1\)"),
    ],
)
def test_another_decoder_must_take_the_same_latents(
    tmp_path: Path, config: dict[str, object], widths: tuple[int, ...], channels: int, words: str
) -> None:
    data = latents(tmp_path / "data")
    manifest = read_manifest(data)
    vae = new_vae(SmallVae(widths, 0, latent_channels=channels), 3, 8)
    vae.register_to_config(**config)
    vae.save_pretrained(tmp_path / "wrong")
    with pytest.raises(UserError, match=rf"sample\.vae = .*: no decoder of the latents in .*: {words}"):
        decoder(data, manifest, CPU, str(tmp_path / "wrong"))
    finer, told = new_vae(SmallVae((4, 4), 0), 3, 8), list[str]()
    finer.register_to_config(scaling_factor=0.5)
    finer.save_pretrained(tmp_path / "finer")
    decoder(data, manifest, CPU, str(tmp_path / "finer"), told.append)
    assert len(told) == 1 and "other weights than those of mine" in told[0]


def test_latents_that_are_not_normalised_are_told_in_one_line_when_training_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    for scale, shift, wrong in ((0.5, 0.0, False), (1.5, 0.0, True), (0.05, 0.0, True), (0.5, 3.0, True)):
        data = latents(tmp_path / f"data-{scale}-{shift}", scale=scale)
        shards = open_data(data)
        moments = shards.gather(np.arange(30))[0].float()
        moments[:, :4] += shift
        write_shards(
            data / "moved", [(moments.half(), torch.arange(30) % 5)], replace(shards.manifest, count=0, shards=())
        )
        told = sampled_warning(open_data(data / "moved"))
        assert bool(told) == wrong and "\n" not in told
        x = scale * (moments[:, :4] + moments[:, 4:] * torch.randn(30, 4, 4, 4))
        if told:
            assert f"mean {float(x.mean()):.1g}"[:6] in told or shift
        if wrong:
            out = tmp_path / f"out-{scale}-{shift}"
            run(
                load(
                    write_recipe(tmp_path / "r.toml", data / "moved", out),
                    ["--stage.align.steps=1", "--stage.transcend.steps=1"],
                )
            )
            assert f"warning: {told}" in capsys.readouterr().out
            assert records(out, "start")


def test_a_channel_far_off_is_told_where_channels_are_normalised(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    moments = torch.randn(30, 8, 4, 4, generator=generator)
    moments[:, 4:] = 0.1
    moments[:, 2] = moments[:, 2] * 2.2
    info = VaeInfo("none")
    told = Manifest(0, (8, 4, 4), "float32", 1.0, info, "random", 5, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    write_shards(tmp_path / "a", [(moments, torch.arange(30) % 5)], told)
    found = open_data(tmp_path / "a")
    looks = latent_statistics(found, np.arange(30))
    spread = (moments[:, 2].double().var(unbiased=False) + 0.01) ** 0.5
    assert looks.std[2] == pytest.approx(float(spread), rel=1e-5)
    assert looks.mean[2] == pytest.approx(float(moments[:, 2].double().mean()), abs=1e-6)
    assert "of 1 of 4 channels are far" in looks.warning(found.manifest) and "channel 2" in looks.warning(
        found.manifest
    )


def test_what_is_unknown_equals_anything_and_one_encoder_has_one_kind_of_latents() -> None:
    how = Normalisation(0.18215, 0.0)
    mse, ema = LatentSpace("sd-vae-ft-mse", "a" * 64, how), LatentSpace("stabilityai/sd-vae-ft-ema", "b" * 64, how)
    assert mse.differences(ema) == [] and mse.differences(LatentSpace("x", "", how)) == []
    assert mse.differences(LatentSpace("mine", "b" * 64, how)) != []
    assert mse.differences(replace(mse, normalisation=Normalisation(0.18215))) == []
    assert Normalisation(1.0, 0.0, (0.0,) * 3).differences(Normalisation(1.0, 0.0)) == []
    assert Normalisation(1.0, 0.0, (0.0,) * 3).differences(Normalisation(1.0, 0.0, (0.0,) * 4)) == [
        "latents_mean of 3 channels (of 4)"
    ]


def test_the_checkpoint_says_what_its_latents_are_of(trained: tuple[Path, Path]) -> None:
    data, out = trained
    newest = max((out / "transcend" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    said = json.loads((newest / "manifest.json").read_text())
    meta = said.get("meta", said)
    assert meta["latents"]["vae"] == "mine" and meta["latents"]["vae_hash"] == read_manifest(data).vae.hash
    assert meta["latents"]["normalisation"]["scale"] == 0.5


def test_a_pipeline_is_not_written_whose_black_would_be_gray(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = trained
    manifest = read_manifest(data)
    write_manifest(data, replace(manifest, vae=replace(manifest.vae, black=0.0)))
    with pytest.raises(UserError, match="data: of images from 0 to 1; the pipeline's code decodes -1 to 1 alone"):
        convert.main([str(out), str(tmp_path / "pipeline"), "--to", "diffusers"])
    assert not (tmp_path / "pipeline").exists()
    convert.main([str(out), str(tmp_path / "weights"), "--to", "huggingface"])


def test_a_published_model_says_a_shift_of_zero_too(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Statistics that replace the VAE's own have none, but the VAE may."""
    data, out = trained
    assert read_manifest(data).shift == 0
    convert.main([str(out), str(tmp_path / "weights"), "--to", "huggingface"])
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["latent_shift"] == 0
    found = read_config(tmp_path / "weights").latents
    assert found is not None and found.normalisation == read_manifest(data).normalisation
    assert "latent_shift" not in latents_as_json(LatentSpace("", "", Normalisation(0.5)))

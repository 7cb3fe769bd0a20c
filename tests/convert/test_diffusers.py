"""The diffusers folder, loaded by diffusers in a process without st_fast, draws what our sampler draws."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from st_fast import kernels
from st_fast.convert.__main__ import main
from st_fast.core.errors import UserError
from st_fast.core.latents import Normalisation
from st_fast.model import build, stored
from st_fast.model.formats import import_file
from st_fast.model.vae import decode, load_vae
from st_fast.prepare.small_vae import SmallVae, new_vae
from st_fast.recipe.architecture import INTERNAL
from st_fast.recipe.schema import Sample
from st_fast.sample.draw import draw_of, read_labels, starting_noise
from st_fast.sample.guided import sample
from tests import foreign, warm
from tests.convert import test_shapes

pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = """
import re
import sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
labels, found = [4, 0, 3], {}
for sampler in ("euler", "heun", "sde"):
    settings = dict(sampler=sampler, num_inference_steps=6, guidance_scale=2.5, seed=11)
    found[sampler] = pipe(labels, output_type="latent", **settings).images
    found[sampler + " images"] = (pipe(labels, output_type="pt", **settings).images * 255).round().to(torch.uint8)
found["second alone"] = pipe(labels[1:2], output_type="latent", first=1, **settings).images
found["from noise"] = pipe(labels, output_type="latent", **settings, latents=torch.ones(3, 4, 4, 4)).images
assert pipe([2]).images[0].size == (8, 8)
try:
    pipe([5])
except ValueError as error:
    assert "0..4 are possible" in str(error)
else:
    raise AssertionError("label 5 of 5 classes was taken")
readme = open("no vae/README.md").read()
snippet = re.search("```python\\n(.*?)```", readme, re.S)[1]
exec(snippet, names := {})  # as somebody would type it, where the folder lies
assert names["latents"].shape == (3, 4, 4, 4) and "No VAE is in this folder" in readme
save_file({key: tensor.contiguous() for key, tensor in found.items()}, out)
assert not any(name.partition(".")[0] == "st_fast" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A tiny VAE that doubles the side."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        new_vae(SmallVae((4, 8), 0), 3, 8).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def drawn(vae, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint, and what the pipeline made of it drew in a process of its own."""
    folder = tmp_path_factory.mktemp("diffusers")
    foreign.repa_checkpoint(folder / "last.pt")
    main([str(folder / "last.pt"), str(folder / "pipe"), "--to", "diffusers", "--vae", str(vae)])
    main([str(folder / "last.pt"), str(folder / "no vae"), "--to", "diffusers"])
    (folder / "program.py").write_text(PROGRAM)
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = warm.run("program.py", folder / "pipe", "out.safetensors", cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_it_draws_the_same_images_from_the_same_noise(sampler, drawn, vae):
    folder, theirs = drawn
    bundle = import_file(folder / "last.pt")
    model = build(bundle.config, kernels.select({}, torch.device("cpu")), 0).eval()
    model.load_state_dict({key: bundle.ema[key] for key in model.state_dict()})
    draw = draw_of(read_labels("4,0,3", 5), 11, 0, 3, torch.device("cpu"))
    settings = Sample(sampler=sampler, steps=6, cfg_scale=2.5, cfg_range=Sample().cfg_range)
    ours = sample(model, draw, settings, bundle.path)
    assert (ours - theirs[sampler]).abs().max() <= 1e-4
    assert (ours - starting_noise(draw, bundle.config)).abs().max() > 0.1  # the model did something
    images = decode(load_vae(vae), ours, Normalisation(0.18215))
    assert images.shape == (3, 3, 8, 8) and images.float().std() > 1
    assert (images.int() - theirs[f"{sampler} images"].int()).abs().max() <= 1


def test_a_sample_does_not_depend_on_its_batch_and_noise_may_be_given(drawn):
    theirs = drawn[1]
    torch.testing.assert_close(theirs["second alone"], theirs["sde"][1:2], rtol=0, atol=1e-5)
    assert not torch.allclose(theirs["from noise"], theirs["sde"])


def test_the_folder_does_not_say_where_the_vae_lay_on_this_machine(drawn, vae):
    files = [path for path in (drawn[0] / "pipe").rglob("*") if path.suffix in (".json", ".md")]
    assert len(files) >= 4 and "of the VAE vae." in (drawn[0] / "pipe" / "README.md").read_text()
    assert [path.name for path in files if str(vae.parent) in path.read_text()] == []


def test_it_is_a_teacher(drawn):
    bundle, table = import_file(drawn[0] / "last.pt"), kernels.select({}, torch.device("cpu"))
    root, cpu = drawn[0] / "pipe", torch.device("cpu")
    found = stored.load_frozen(root, bundle.config, "ema", table, cpu, torch.float32).state_dict()
    assert all(torch.equal(found[key], bundle.ema[key]) for key in found)


def test_a_vae_of_other_channels_is_refused(vae, tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt", replace(foreign.TINY, channels=3))
    with pytest.raises(UserError, match="4 channels, the model has 3"):
        main([str(tmp_path / "last.pt"), str(tmp_path / "pipe"), "--to", "diffusers", "--vae", str(vae)])
    assert not (tmp_path / "pipe").exists()


def test_pixels_need_no_vae(tmp_path, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt", replace(foreign.TINY, channels=3))
    main([str(tmp_path / "last.pt"), str(tmp_path / "pipe"), "--to", "diffusers", "--vae", "pixels"])
    assert not (tmp_path / "pipe" / "vae").exists()
    config = json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())
    assert (config["latent_scale"], config["vae"]) == (2.0, "pixels")
    assert "warning" not in capsys.readouterr().out


def test_without_a_vae_the_place_is_left_open(tmp_path, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    main([str(tmp_path / "last.pt"), str(tmp_path / "pipe"), "--to", "diffusers"])
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["vae"] == [None, None] and index["transformer"] == ["sit_transformer", "SiTTransformer"]
    assert "st_fast.core.random" not in (tmp_path / "pipe" / "pipeline.py").read_text()
    assert "warning: without a VAE the pipeline gives latents, no images" in capsys.readouterr().out


def scaled(vae: Path, folder: Path, scale: float) -> Path:
    """The same VAE with another scaling_factor in its config."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text()) | {"scaling_factor": scale}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_file_that_tells_no_scale_gets_that_of_the_vae_that_is_named(vae, tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    own = scaled(vae, tmp_path / "own", 0.83)
    main([str(tmp_path / "last.pt"), "--to", "diffusers", str(tmp_path / "pipe"), "--vae", str(own)])
    config = json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())
    assert (config["latent_scale"], config["vae"]) == (0.83, "own")


def test_whose_latents_a_file_was_trained_on_is_said_or_told_to_be_a_guess(vae, tmp_path, capsys):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    own, guess = scaled(vae, tmp_path / "own", 0.83), "sd-vae-ft-mse, as is usual for 4 channels"
    for name, options, expected, called in (
        ("guess", [], (0.18215, "sd-vae-ft-mse"), guess), ("said", ["--vae", str(own)], (0.83, "own"), "own"),
    ):  # fmt: skip
        main([str(tmp_path / "last.pt"), str(tmp_path / name), "--to", "huggingface", *options])
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["latent_scale"], config["vae"]) == expected
        assert f"of the VAE {called}" in (tmp_path / name / "README.md").read_text()
        assert (f"note: the latents are taken for those of {guess}" in capsys.readouterr().out) == (not options)
    foreign.repa_checkpoint(tmp_path / "three.pt", replace(foreign.TINY, channels=3))
    with pytest.raises(UserError, match="4 channels, the model has 3"):
        main([str(tmp_path / "three.pt"), str(tmp_path / "hf3"), "--to", "huggingface", "--vae", str(own)])


def test_a_vae_of_another_scale_than_the_model_tells_is_refused(vae, tmp_path):
    foreign.repa_checkpoint(tmp_path / "last.pt")
    own = scaled(vae, tmp_path / "own", 0.83)
    main([str(tmp_path / "last.pt"), str(tmp_path / "hf"), "--to", "huggingface"])
    with pytest.raises(UserError, match=r"no decoder of the model's latents \(in brackets\): scale 0.83 \(0.18215\)"):
        main([str(tmp_path / "hf"), str(tmp_path / "pipe"), "--to", "diffusers", "--vae", str(own)])
    assert not (tmp_path / "pipe").exists()


EVERY: dict[str, Any] = {"norm": "rms_affine", "position": "both", "mlp": "swiglu", "qk_norm": "rms", "qkv_bias": False}


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "rms", "position": "rope"},
        {"norm": "rms_affine", "qk_norm": False, "position": "both", "latent_size": 8},
        {"mlp": "swiglu", "mlp_ratio": 3.3, "qk_norm": "rms"},
        {"mlp": "relu2"},
        {"registers": 3, "position": "rope", "value_residual": True, "qkv_bias": False},
        EVERY,
        EVERY | {"registers": 2, "value_residual": True, "internal_head": 2},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("base", [test_shapes.SIT, test_shapes.MMDIT], ids=["sit", "mmdit"])
def test_its_copy_has_every_option_of_the_network(base, options, tmp_path):
    from st_fast.convert.mmdit_transformer import MMDiTTransformer
    from st_fast.convert.sit_transformer import SiTTransformer

    if base.network == "mmdit" and {"registers", "value_residual"} & {*options}:
        pytest.skip("of a SiT alone")
    model = test_shapes.make_stage(tmp_path / "stage", replace(base, depth=3, width=48, heads=4, **options))
    main([str(tmp_path / "stage"), str(tmp_path / "pipe"), "--to", "diffusers"])
    kind = SiTTransformer if base.network == "sit" else MMDiTTransformer
    copy = kind.from_pretrained(tmp_path / "pipe" / "transformer")
    assert copy.state_dict().keys() == model.state_dict().keys()
    generator, (height, width) = torch.Generator().manual_seed(1), model.config.latent_sides
    x, t = torch.randn(3, 4, height, width, generator=generator), torch.tensor([0.1, 0.5, 0.8])
    condition = torch.tensor([0, 5, 3]) if base.network == "sit" else torch.randn(3, 3, 6, generator=generator)
    internal = bool(model.config.internal_head)
    with torch.no_grad():
        ours = model(x, t, condition, (INTERNAL,) if internal else 0)
        theirs = copy(x, t, condition, internal=internal)
        for mine, own in zip((ours[0], *ours[1]), theirs, strict=True) if internal else ((ours[0], theirs),):
            torch.testing.assert_close(own, mine, rtol=0, atol=2e-5)
            assert mine.std() > 0.1

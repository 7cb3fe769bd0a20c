"""Models of latents that are no squares, in the forms that other programs read."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from st_fast import kernels
from st_fast.convert.__main__ import main
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.model import DiffusionTransformer, network, stored
from st_fast.recipe.architecture import Model

pytestmark = pytest.mark.usefixtures("one_thread")
SIT = Model("custom", 2, 32, 2, 2, 4, (6, 10), num_classes=5, qk_norm=True)
MMDIT = Model(
    "custom", 2, 32, 2, 2, 4, (6, 10), network="mmdit", num_classes=1000, text_width=6, text_length=3, qk_norm=False
)


def filled(config: Model) -> DiffusionTransformer:
    torch.manual_seed(4)
    model = network(config, kernels.select({}, torch.device("cpu"))).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def make_stage(folder: Path, config: Model) -> DiffusionTransformer:
    model = filled(config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    meta = {"architecture": config.architecture(), "flow": "linear"}
    checkpoint.save(folder / "checkpoints", 7, {"model": weights, "ema": weights}, meta)
    return model


@pytest.mark.parametrize("config", [SIT, MMDIT], ids=["sit", "mmdit"])
def test_the_diffusers_copy_has_the_shape_and_the_same_velocity(config, tmp_path):
    pytest.importorskip("diffusers")
    from st_fast.convert.mmdit_transformer import MMDiTTransformer
    from st_fast.convert.sit_transformer import SiTTransformer

    model = make_stage(tmp_path / "stage", config)
    main([str(tmp_path / "stage"), str(tmp_path / "pipe"), "--to", "diffusers"])
    said = json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())
    assert said["latent_size"] == [6, 10] and "4 × 6 × 10" in (tmp_path / "pipe" / "README.md").read_text()
    copy = (SiTTransformer if config is SIT else MMDiTTransformer).from_pretrained(tmp_path / "pipe" / "transformer")
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 4, 6, 10, generator=generator), torch.tensor([0.1, 0.5, 0.8])
    condition = torch.tensor([0, 5, 3]) if config is SIT else torch.randn(3, 3, 6, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(copy(x, t, condition), model(x, t, condition)[0], rtol=0, atol=2e-5)


def test_a_pipeline_draws_height_times_width(tmp_path):
    pytest.importorskip("diffusers")
    from st_fast.convert.pipeline import SiTPipeline
    from st_fast.convert.sit_transformer import SiTTransformer

    torch.manual_seed(0)
    for size, shape in (([4, 6], (2, 4, 4, 6)), (4, (2, 4, 4, 4))):
        transformer = SiTTransformer(depth=1, width=16, heads=2, patch=2, channels=4, latent_size=size, num_classes=5)
        pipe = SiTPipeline(transformer)
        pipe.set_progress_bar_config(disable=True)
        assert pipe([1, 2], num_inference_steps=1, output_type="latent").images.shape == shape


@pytest.mark.parametrize("config", [SIT, MMDIT], ids=["sit", "mmdit"])
def test_a_checkpoint_and_a_published_folder_are_read_with_their_shape(config, tmp_path, capsys):
    make_stage(tmp_path / "stage", config)
    assert stored.read_model(tmp_path / "stage", print).loaded.config.latent_size == (6, 10)
    main([str(tmp_path / "stage"), str(tmp_path / "hf"), "--to", "huggingface"])
    assert stored.read_model(tmp_path / "hf", print).loaded.config.latent_size == (6, 10)
    main([str(tmp_path / "hf")])
    assert "latents 4 × 6 × 10" in capsys.readouterr().out
    main([str(tmp_path / "hf"), str(tmp_path / "again")])
    words = shlex.split(capsys.readouterr().out.partition("for a recipe: ")[2])
    assert {"--model.latent_size=[6, 10]", f"--model.qk_norm={str(config.qk_norm).lower()}"} <= {*words}


@pytest.mark.parametrize("layout", ["sit", "repa", "self-transcendence", "sra"])
def test_other_projects_own_files_are_refused(layout, tmp_path):
    make_stage(tmp_path / "stage", SIT)
    with pytest.raises(UserError, match=rf"latents of 6 x 10: {layout}'s own code takes square ones only"):
        main([str(tmp_path / "stage"), str(tmp_path / "model.pt"), "--to", layout])
    make_stage(tmp_path / "square", replace(SIT, latent_size=8))
    main([str(tmp_path / "square"), str(tmp_path / "model.pt"), "--to", layout])

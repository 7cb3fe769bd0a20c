"""Networks with a fusion (SPRINT) in other forms: whole where these are ours, refused where others have no place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from st_fast import kernels
from st_fast.convert.__main__ import main
from st_fast.convert.card import _in_training
from st_fast.core.errors import UserError
from st_fast.model import SiT, build
from st_fast.model.stored import read_model
from st_fast.recipe import load
from tests.sample.tiny_run import make_run

STAGE = 'supervision = "none"\nroute = "sprint"\nroute_first = 1\nroute_last = 2'


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Path:
    """A run whose network has three blocks and a fusion around the second."""
    folder = tmp_path_factory.mktemp("fused")
    with pytest.MonkeyPatch.context() as patch:
        from tests.sample import tiny_run

        patch.setattr(tiny_run, "RECIPE", tiny_run.RECIPE.replace("depth = 2", "depth = 3"))
        return make_run(folder, seed=1, supervision=STAGE)


def test_a_hugging_face_folder_and_a_stage_keep_the_fusion_and_its_blocks(fused, tmp_path, capsys):
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([3, 5])
    recipe = load(fused / "recipe.toml")
    ours = build(recipe.for_stage(recipe.stages[0]).model, kernels.select({}, torch.device("cpu")), 0).eval()
    ours.load_state_dict(dict(read_model(fused, print).loaded.ema))
    main([str(fused), str(tmp_path / "hf"), "--to", "huggingface"])
    main([str(fused), str(tmp_path / "stage")])
    assert "fusion around blocks 2 to 2" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Blocks 2 to 2 can be skipped" in card and 'guidance="path_drop"' in card
    for folder in ("hf", "stage"):
        config = read_model(tmp_path / folder, print).loaded.config
        assert (config.fusion_first, config.fusion_last) == (1, 2)
    theirs = SiT.from_pretrained(str(tmp_path / "hf")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y)[0], ours(x, t, y)[0])
        torch.testing.assert_close(theirs.without_path(x, t, y), ours.without_path(x, t, y))


@pytest.mark.parametrize("form", ["sit", "repa", "self-transcendence", "sra", "self-flow", "diffusers"])
def test_what_others_code_has_no_fusion_for_is_refused(form, fused, tmp_path):
    target = tmp_path / ("out" if form == "diffusers" else "out.pt")
    only = "only stage, huggingface, speedrundit do"
    with pytest.raises(UserError, match=f"--to {form}: .* has a fusion .*, for which {only}"):
        main([str(fused), str(target), "--to", form])
    assert not target.exists()


def test_a_cards_scores_say_that_they_were_drawn_by_path_drop():
    metrics = {"num": 8, "cfg_scale": 3.0, "guidance": "path_drop", "classifier_digest": "0", "frechet": 0.5}
    ((_, _, how),) = _in_training({"step": 4, "metrics": metrics})
    assert "cfg_scale 3.0, guidance path_drop" in how

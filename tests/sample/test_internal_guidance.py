"""Internal Guidance in sampling: the formula in float64, its interval, one pass, and whose head it leads away from."""

import json
import re
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.errors import UserError
from st_fast.model import build
from st_fast.model.transformer import INTERNAL
from st_fast.recipe.schema import Model, Sample
from st_fast.sample import __main__ as sample
from st_fast.sample.contrast import Correction
from st_fast.sample.draw import balanced
from st_fast.sample.guided import guided_velocity, sample_from
from st_fast.sample.internal import EarlyHead
from st_fast.sample.model import sampling
from st_fast.sample.presets import PRESETS
from st_fast.sample.set import settings_of
from tests.sample.tiny_run import make_run

CONFIG = Model(
    depth=3, width=16, heads=2, patch=2, channels=3, latent_size=(4, 6), num_classes=5, zero_init=False, internal_head=1
)
INTERNAL_STAGE = 'supervision = "internal_guidance"\ndepth = 1'
EARLY_STAGE = 'supervision = "velocity_head"\ndepth = 1\nhidden = 24\nt_range = [0.2, 0.6]'


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, kernels.select({}, torch.device("cpu")), 7).eval().requires_grad_(False)


X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([1, 4])


def both(model, label, t):
    """Final and internal velocity in float64, a sample at a time."""
    found = [model(x[None], torch.tensor([t]), torch.tensor([y]), INTERNAL) for x, y in zip(X, label, strict=True)]
    return (np.concatenate([pair[i].double().numpy() for pair in found]) for i in (0, 1))


@pytest.mark.parametrize(
    ("t", "cfg", "internal"),
    [
        (0.5, True, True),
        (0.2, True, False),
        (0.9, False, True),
        (0.3, True, True),  # intervals are closed
        (0.7, True, True),
        (0.1, False, False),
    ],
)
def test_each_branch_is_led_away_from_its_own_internal_output_and_cfg_joins_them(model, t, cfg, internal):
    settings = Sample(cfg_scale=2.5, cfg_range=(0.2, 0.7), internal_guidance=1.4, internal_range=(0.3, 0.95))

    def branch(labels):
        final, shallow = both(model, labels, t)
        return shallow + 1.4 * (final - shallow) if internal else final

    expected = branch(LABELS)
    if cfg:
        null = branch([5, 5])
        expected = null + 2.5 * (expected - null)
    found = guided_velocity(model, LABELS, settings)(X, t).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_pass_gives_both_and_a_scale_of_1_asks_for_no_head(model, monkeypatch):
    taps, forward = [], type(model).forward

    def counted(self, x, t, condition, tap=0):
        taps.append((len(x), tap))
        return forward(self, x, t, condition, tap)

    monkeypatch.setattr(type(model), "forward", counted)
    for scale, window in ((1.4, (0.0, 1.0)), (1.0, (0.0, 1.0)), (1.4, (0.6, 1.0))):
        settings = Sample(cfg_scale=2.0, cfg_range=(0.0, 1.0), internal_guidance=scale, internal_range=window)
        guided_velocity(model, LABELS, settings)(X, 0.5)
    assert taps == [(4, INTERNAL), (4, 0), (4, 0)]


def test_the_head_of_stage_1_takes_the_place_of_the_internal_one(model):
    grids = []

    def head(tokens, grid):
        grids.append(grid)
        return tokens.mean((1, 2)).view(-1, 1, 1, 1).expand(-1, 3, 4, 6)

    settings = Sample(cfg_scale=1.0, internal_guidance=1.7)
    found = guided_velocity(model, LABELS, settings, head=EarlyHead(Namespace(latents=head), 2))(X, 0.4)
    final, stream = model(X, torch.full((2,), 0.4), LABELS, 2)
    expected = head(stream, None) + 1.7 * (final - head(stream, None))
    assert torch.allclose(found, expected, atol=1e-6) and grids[0] == (2, 3)


def test_dopri5_is_told_where_either_guidance_begins_and_ends(model, monkeypatch):
    calls = []
    monkeypatch.setattr("st_fast.sample.guided.dopri5", lambda *given: calls.append(given[3]) or given[1])
    draw = balanced(0, 0, 2, 5, torch.device("cpu"))
    usual = Sample(sampler="dopri5", cfg_range=(0.1, 0.7), internal_range=(0.3, 0.9))
    for cfg, internal in ((1.0, 1.5), (2.0, 1.5), (2.0, 1.0)):
        settings = replace(usual, cfg_scale=cfg, internal_guidance=internal)
        sample_from(model, X, draw, settings, "linear")
    assert calls == [(0.3, 0.9), (0.1, 0.7, 0.3, 0.9), (0.1, 0.7)]


@pytest.fixture(scope="module")
def guided_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("internal"), supervision=INTERNAL_STAGE)


@pytest.fixture(scope="module")
def early_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("early"), supervision=EARLY_STAGE)


def drawn(*words):
    """The settings that are written beside a picture, and its latents' images."""
    request = sample.parse([str(word) for word in words])
    with sampling(request.samples) as (_, sampler, say):
        return settings_of(sampler), sampler.images(0, 3)[0], request.target, say


def test_a_run_samples_with_its_head_and_names_and_records_tell_of_it(guided_run):
    words = (guided_run, "--internal-guidance", 2.5, "--internal-range", 0.2, 0.9)
    record, images, target, _ = drawn(*words)
    assert target.name == "12-heun3-cfg2-ig2.5.png"
    assert (record["internal_guidance"], record["internal_range"]) == (2.5, (0.2, 0.9))
    plain, others, name, _ = drawn(guided_run)
    assert name.name == "12-heun3-cfg2.png" and not {"internal_guidance", "internal_range"} & set(plain)
    assert not torch.equal(images, others)


def test_a_checkpoint_without_its_run_samples_with_its_head_too(guided_run, tmp_path):
    (found,) = (guided_run / "plain" / "checkpoints").iterdir()
    alone = tmp_path / "alone"
    alone.symlink_to(found)
    ours, images, *_ = drawn(guided_run, "--internal-guidance", 2.5)
    theirs, others, *_ = drawn(alone, "--internal-guidance", 2.5, "--vae", "pixels")
    assert torch.equal(images, others) and ours["model_sha256"] == theirs["model_sha256"]


def test_stage_1s_head_guides_at_the_times_that_it_learnt_and_says_so(early_run, capsys):
    words = (early_run, "--internal-guidance", 2.5, "--internal-range", 0.3, 1.0)
    record, images, *_ = drawn(*words)
    told = capsys.readouterr().out
    assert "internal guidance by the head of block 1, raw weights, at times 0.3 to 0.6" in told
    assert record["internal_range"] == (0.3, 0.6) and record["internal_block"] == 1
    assert re.fullmatch("[0-9a-f]{64}", record["internal_sha256"])
    _, others, *_ = drawn(early_run)
    assert not torch.equal(images, others)


def test_a_network_with_a_head_of_its_own_needs_none_beside_it(guided_run):
    with sampling(sample.parse([str(guided_run), "--internal-guidance", "2"]).samples) as (_, sampler, _):
        assert sampler.head is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda heads: heads.pop("projectors.0.bias"), "heads: .*1 missing: 'projectors.0.bias'"),
        (lambda heads: heads["projectors.2.bias"].fill_(torch.nan), "heads: .*projectors.2.bias"),
    ],
)
def test_a_head_that_is_damaged_is_refused(tmp_path, damage, message):
    run = make_run(tmp_path, supervision=EARLY_STAGE)
    (path,) = (run / "plain" / "checkpoints").iterdir()
    found = checkpoint.load(path)
    groups = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in found.groups.items()}
    damage(groups["heads"])
    checkpoint.save(path.parent, 20, groups, found.meta)
    request = sample.parse([str(run), "--internal-guidance", "2"])
    with pytest.raises(UserError, match=message), sampling(request.samples):
        pass


def test_its_weights_are_the_checkpoints(early_run):
    request = sample.parse([str(early_run), "--internal-guidance", "2"])
    (path,) = (early_run / "plain" / "checkpoints").iterdir()
    saved = checkpoint.load(path, ("heads",)).groups["heads"]
    with sampling(request.samples) as (_, sampler, _):
        own = sampler.head.module.state_dict()
    assert sampler.head.block == 1 and own.keys() == saved.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--internal-guidance", "1.5", "--internal-range", "0.7", "0.8"),
            "--internal-range 0.7 0.8: the head of plain",
        ),
        (("--internal-guidance", "2", "--internal-range", "0.6", "0.9"), "--internal-range 0.6 0.9: the head of plain"),
        (("--internal-range", "0.3", "0.3"), "--internal-range 0.3 0.3: 0 ≤ LOW < HIGH ≤ 1"),
        (("--internal-range", "0.8", "0.3"), "--internal-range 0.8 0.3: 0 ≤ LOW < HIGH ≤ 1"),
        (("--internal-range", "-0.1", "0.3"), "--internal-range -0.1: at least 0"),
        (("--internal-range", "0", "1.5"), "--internal-range 1.5: at most 1"),
        (("--internal-guidance", "-1"), "--internal-guidance -1: at least 0"),
        (("--internal-guidance", "nan"), "--internal-guidance nan: a finite number is needed"),
    ],
)
def test_bad_input_is_told_in_one_line(early_run, words, message):
    with pytest.raises(UserError) as told:
        sample.parse([str(early_run), *words])
    assert str(told.value).startswith(message) and "\n" not in str(told.value)


@pytest.mark.parametrize("words", [("--internal-guidance", "1.4"), ("--preset", "internal-guidance")])
def test_a_model_without_a_head_says_what_would_have_one(tmp_path, words):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"--internal-guidance 1\.4: .* has no internal head; .*internal_guidance"):
        sample.parse([str(run), *words])


def test_a_head_that_learnt_the_latent_does_not_serve(tmp_path):
    run = make_run(tmp_path, supervision=f'{EARLY_STAGE}\ntarget = "latent"')
    with pytest.raises(UserError, match="--internal-guidance 2: the head of plain predicts the clean latent"):
        sample.parse([str(run), "--internal-guidance", "2"])


def test_the_preset_is_the_released_scripts():
    preset = PRESETS["internal-guidance"]
    assert (preset["sampler"], preset["steps"]) == ("sde", 250)
    assert (preset["cfg_scale"], preset["cfg_range"]) == (1.35, (0.0, 0.7))
    assert (preset["internal_guidance"], preset["internal_range"]) == (1.4, (0.0, 1.0))


def test_a_preset_leaves_nothing_of_the_recipes_own_guidance():
    recipes_own = Sample(guidance="path_drop", cfg_scale=3.0, internal_guidance=1.7)
    drawn = {name: replace(recipes_own, **preset) for name, preset in PRESETS.items()}
    assert {name: one.guidance for name, one in drawn.items() if one.guidance != "cfg"} == {"sprint": "path_drop"}
    assert {n: one.internal_guidance for n, one in drawn.items() if one.internal_guidance != 1} == {
        "internal-guidance": 1.4
    }


def test_a_set_of_an_older_version_is_continued(guided_run):
    """Without guidance of this kind a set's settings are what they were before there was any."""
    folder = guided_run / "set"
    sample.main([str(guided_run), "--num", "4", "--npz", "--out", str(folder)])
    said = json.loads((folder / "sample.json").read_text())
    assert not {"internal_guidance", "internal_range", "internal_block"} & set(said)


@pytest.mark.parametrize("null", [True, False])
def test_a_contrasts_correction_is_the_final_outputs_alone(model, null):
    mean, settings = torch.full((3, 4, 6), 2.0), Sample(cfg_scale=2.5, cfg_range=(0.0, 1.0), internal_guidance=1.4)
    found = guided_velocity(model, LABELS, settings, None, Correction(0.1, null, "unbiased", mean, "linear"))(X, 0.5)

    def branch(labels, biased):
        final, shallow = both(model, labels, 0.5)
        return shallow + 1.4 * ((0.9 * final - 0.1 * 2.0 if biased else final) - shallow)

    away = branch([5, 5], null)
    expected = away + 2.5 * (branch(LABELS, True) - away)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

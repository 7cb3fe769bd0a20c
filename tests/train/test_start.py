"""`init`: a stage starts from another model, matched strictly, read once, and recorded."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from st_fast import kernels
from st_fast.convert.__main__ import main as convert
from st_fast.convert.exporting import export_file
from st_fast.core import checkpoint
from st_fast.core.checkpoint import Checkpoint
from st_fast.core.errors import Interrupted, UserError
from st_fast.core.ranks import Ranks
from st_fast.core.signals import StopRequest
from st_fast.model import build
from st_fast.model.formats import import_file
from st_fast.model.stored import read_model
from st_fast.recipe import RecipeError, load
from st_fast.recipe.methods import EVERYWHERE, METHODS, Method, Selection
from st_fast.recipe.schema import Optim
from st_fast.sample.source import of_run
from st_fast.train import start, trainer
from st_fast.train.continuity import Changes, check_recipe
from st_fast.train.log import Log
from st_fast.train.optim import Optimizer
from st_fast.train.parallel import hand_out
from st_fast.train.run import run
from st_fast.train.supervision import Parts, Supervision
from tests import foreign, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = ("--optim.lr=1e-30", "--stage.plain.steps=1")
"""One step that changes no weight."""


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Seconds of measuring the device for a figure that nothing here reads."""
    monkeypatch.setattr("st_fast.train.log.matmul_rate", lambda device, dtype: 1e11)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture
def recipe(data, tmp_path) -> Path:
    """The tiny recipe with one plain stage that starts from `tmp_path / "repa.pt"`."""
    path = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    text = path.read_text()
    plain = f'[[stage]]\nname = "plain"\nsupervision = "none"\nsteps = 10\ninit = "{tmp_path}/repa.pt"\n'
    path.write_text(text[: text.index("[[stage]]")] + plain)
    return path


def newest(out: Path, name: str = "plain") -> Checkpoint:
    found = checkpoint.latest(out / name / "checkpoints", pytest.fail)
    assert found is not None
    return found


def refused(recipe: Path, *options: str) -> str:
    """The one line with which a run ends before it trains."""
    with pytest.raises(UserError) as caught:
        run(load(recipe, options))
    assert "\n" not in str(caught.value)
    assert not (recipe.parent / "out" / "plain" / "checkpoints").exists()
    corrected = load(recipe, ("--optim.lr=0.5",))  # nothing began: it may be put right
    check_recipe(corrected, Changes(False, Log(recipe.parent / "out" / "log.jsonl", Ranks(0, 1, torch.device("cpu")))))
    return str(caught.value)


@pytest.mark.parametrize("taken", ["ema", "raw", "state"])
def test_a_stage_starts_from_a_foreign_file_whose_heads_it_leaves(taken, recipe, tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "repa.pt")
    run(load(recipe, [*STILL, f"--stage.plain.init_weights={taken}"]))
    found = newest(tmp_path / "out")
    raw, averaged = {"ema": ("ema", "ema"), "raw": ("model", "model"), "state": ("model", "ema")}[taken]
    keys = [key for key in content["model"] if not key.startswith("projectors")]
    assert set(found.groups["model"]) == set(keys) and "heads" not in found.groups
    assert all(torch.equal(found.groups["model"][key], content[raw][key]) for key in keys)
    decay = 0.9 if taken == "state" else 1.0  # of a step by nothing, the average moves towards the raw weights only
    for key in keys[1:]:
        expected = decay * content[averaged][key] + (1 - decay) * content[raw][key]
        torch.testing.assert_close(found.groups["ema"][key], expected, rtol=1e-5, atol=1e-6)
    assert found.groups["optim"]["model.step"] == (4 if taken == "state" else 1)
    said = found.meta["init"]
    assert (said["layout"], said["step"], said["weights"]) == ("repa", 3, taken) and len(said["sha256"]) == 64
    assert tiny.records(tmp_path / "out", "start")[0]["init"] == said


def test_official_sit_is_turned_round(recipe, tmp_path):
    config = replace(foreign.TINY, qk_norm=False)
    args = argparse.Namespace(model="SiT", num_classes=5, prediction="velocity")
    torch.save({"model": foreign.trunk(config, 5), "args": args}, tmp_path / "sit.pt")
    run(load(recipe, [*STILL, "--model.qk_norm=false", f"--stage.plain.init={tmp_path}/sit.pt"]))
    expected = import_file(tmp_path / "sit.pt", number_of_heads=2).model
    found = newest(tmp_path / "out").groups["model"]
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not torch.equal(found["final_layer.linear.weight"], foreign.trunk(config, 5)["final_layer.linear.weight"])


@pytest.mark.parametrize("network", ["sit", "mmdit"])
def test_the_optimiser_goes_on_as_the_other_projects_would(network, tmp_path):
    """The fourth update, ours after the import and torch's AdamW after loading its own state, from one gradient."""
    config = {"sit": foreign.TINY, "mmdit": foreign.TINY_TEXT}[network]
    content = foreign.repa_checkpoint(tmp_path / "repa.pt", config, steps=3)
    for table in (content["model"], content["ema"]):
        table["pos_embed"] += 1e-3  # another project's positions need not be ours to the last bit
    torch.save(content, tmp_path / "repa.pt")
    path = tmp_path / "r.toml"
    sizes = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.described().items())
    path.write_text(
        f'[model]\n{sizes}\n[data]\npath = "x"\n'
        f'[[stage]]\nname = "a"\nsupervision = "none"\nsteps = 9\ninit = "{tmp_path}/repa.pt"\ninit_weights = "state"\n'
    )
    recipe, table = load(path), kernels.select({}, torch.device("cpu"))
    model = build(recipe.model, table, 0)
    model.use_null(null := torch.ones(77, 6))
    settings = Optim(lr=1e-4, grad_clip=0.0, ema_decay=0.9)
    ours = Optimizer(model, torch.nn.Module(), settings, torch.float32, kernels.adamw_ema_, kernels.grad_norm)
    taken, _ = start.taken_over(recipe, recipe.stages[0], ours.state(), pytest.fail)
    hand_out(ours.state(), taken, Ranks(0, 1, torch.device("cpu")))
    ours.follow()
    theirs = {key: torch.nn.Parameter(t.clone(), key != "pos_embed") for key, t in content["model"].items()}
    assert torch.equal(model.pos_embed, content["model"]["pos_embed"])
    numbered = [p for key, p in theirs.items() if network == "sit" or key != "pos_embed"]
    adamw = torch.optim.AdamW(numbered, lr=1e-4, weight_decay=0.0)
    adamw.load_state_dict(content["opt"])
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[key].grad = parameter.grad.clone()
    before = {key: t.clone() for key, t in ours.state()["model"].items()}
    ours.update()
    adamw.step()
    after = dict(ours.state()["model"])
    if network == "mmdit":
        assert torch.equal(after.pop("null_context")[0], null)  # of this data, whatever the file was trained on
    for key, tensor in after.items():
        moved = theirs[key].detach() - content["model"][key]
        torch.testing.assert_close(tensor - before[key], moved, rtol=1e-3, atol=2e-8)


def test_a_resumed_stage_ends_bit_by_bit_the_same_and_never_reads_the_file_again(recipe, tmp_path, monkeypatch):
    foreign.repa_checkpoint(tmp_path / "repa.pt")
    run(load(recipe, [f"--run.out={tmp_path}/whole"]))
    stop, count, call = StopRequest(), [0], trainer.Step.__call__

    def stepping(self, *arguments):
        count[0] += 1
        if count[0] == 3:
            stop.name = "SIGTERM"
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("st_fast.train.run.stop_on_signals", lambda: nullcontext(stop))
        patch.setattr(trainer.Step, "__call__", stepping)
        with pytest.raises(Interrupted):
            run(load(recipe))
    (tmp_path / "repa.pt").unlink()
    run(load(recipe))
    ours, theirs = newest(tmp_path / "out"), newest(tmp_path / "whole")
    for group, tensors in theirs.groups.items():
        assert all(torch.equal(ours.groups[group][key], tensor) for key, tensor in tensors.items())
    assert ours.meta["init"] == theirs.meta["init"] and ours.meta["init"]["step"] == 3


def test_every_mismatch_is_told_in_one_line_before_training(recipe, tmp_path):
    foreign.repa_checkpoint(tmp_path / "repa.pt", replace(foreign.TINY, depth=2, num_classes=7))
    line = refused(recipe)
    assert "depth 2 (this recipe: 3), num_classes 7 (this recipe: 5)" in line and "'y_embedder.embedding_table" in line
    assert "blocks.2.attn.qkv.weight" in line
    foreign.repa_checkpoint(tmp_path / "repa.pt", replace(foreign.TINY, heads=4))
    assert "heads 4 (this recipe: 2)" in refused(recipe)  # qk-norm tells how many
    foreign.repa_checkpoint(tmp_path / "repa.pt")
    assert "trained on the linear path, flow.path = 'cosine'" in refused(recipe, "--flow.path=cosine")
    assert "no key of the model begins with 'blok'" in refused(recipe, '--stage.plain.init_fresh=["blok"]')
    assert "6 unexpected: 'projectors.0.0." in refused(recipe, "--stage.plain.init_heads=match")
    (tmp_path / "repa.pt").unlink()
    assert "there is nothing" in refused(recipe)
    (tmp_path / "repa.pt").write_bytes(b"\x80\x02junk")
    assert "refused, nothing executed" in refused(recipe)


@pytest.mark.parametrize(
    ("theirs", "parts"),
    [
        ({"num_classes": 7}, ["y_embedder."]), ({"latent_size": 6}, ["pos_embed"]),
        ({"num_classes": 7, "latent_size": 6}, ["pos_embed", "y_embedder."]), ({"width": 64}, None),
    ],
)  # fmt: skip
def test_other_classes_or_another_size_name_the_init_fresh_that_starts_all_the_same(recipe, tmp_path, theirs, parts):
    foreign.repa_checkpoint(tmp_path / "repa.pt", replace(foreign.TINY, **theirs))
    line = refused(recipe)
    if parts is None:  # the blocks differ, too
        assert "init_fresh" not in line
        return
    assert f"(init_fresh = {json.dumps(parts)} draws these parts anew)" in line
    fresh = load(recipe, [f"--stage.plain.init_fresh={json.dumps(parts)}"])
    start.check(fresh, fresh.stages[0], (), pytest.fail)


def test_what_no_shape_tells_of_a_fusion_or_of_the_output_is_compared_all_the_same(data, tmp_path):
    def stage(name: str, last: int, *lines: str) -> str:
        route = 'supervision = "none"\nsteps = 1\nroute = "sprint"\nroute_first = 1'
        return "\n".join((f'[[stage]]\nname = "{name}"', route, f"route_last = {last}", *lines, ""))

    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    head = path.read_text().split("[[stage]]")[0].replace("depth = 3", "depth = 4")
    path.write_text(head + stage("one", 2) + stage("two", 3, 'init = "one"'))
    with pytest.raises(UserError, match=r"another architecture: fusion_last 2 \(this recipe: 3\)$"):
        run(load(path))
    path.write_text(head + stage("two", 2, f'init = "{tmp_path}/out/one"'))
    options = [f"--run.out={tmp_path}/x", "--model.prediction=x"]
    with pytest.raises(UserError, match=r"another architecture: prediction .*velocity.* \(this recipe: .*x.*\)$"):
        run(load(path, options))
    run(load(path, [*options, '--stage.two.init_fresh=["final_layer."]']))
    plain = stage("two", 2, f'init = "{tmp_path}/plain/one"')
    path.write_text(head + '[[stage]]\nname = "one"\nsupervision = "none"\nsteps = 1\n')
    run(load(path, [f"--run.out={tmp_path}/plain"]))
    path.write_text(head + plain)
    with pytest.raises(UserError, match=r'\(init_fresh = \["fusion_proj.", "mask_token"\] draws these parts anew\)'):
        run(load(path, [f"--run.out={tmp_path}/y"]))


def test_more_classes_than_the_data_has_are_told(data, tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    (stage, *_) = load(recipe).stages
    told = "warning: the data has 5 classes, the model 12; the others are never trained; "
    told += "--model.num_classes=5 fits\n"
    for classes in (12, 5):
        more = [f"--model.num_classes={classes}", f"--run.out={tmp_path}/{classes}", f"--stage.{stage.name}.steps=1"]
        more += ["--stage.transcend.steps=1"]
        run(load(recipe, more))
        assert capsys.readouterr().out.count(told) == (classes == 12)


def test_a_later_stages_start_is_checked_before_the_first_trains(data, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    torch.save(foreign.repa_weights(replace(foreign.TINY, width=64), 1), tmp_path / "wide.pt")
    start_there = f"--stage.transcend.init={tmp_path}/wide.pt"
    with pytest.raises(UserError, match=r"width 64 \(this recipe: 32\)"):
        run(load(recipe, [start_there]))
    foreign.repa_checkpoint(tmp_path / "wide.pt")
    with pytest.raises(UserError, match=r"init_heads = 'match'.*6 missing: 'projectors.0.weight'"):
        run(load(recipe, [start_there, "--stage.transcend.init_heads=match"]))
    assert not (tmp_path / "out" / "align").exists()


def test_a_file_without_optimiser_state_cannot_be_continued(recipe, tmp_path):
    torch.save(foreign.repa_weights(foreign.TINY, 1), tmp_path / "repa.pt")
    assert "no optimiser state; allowed" in refused(recipe, "--stage.plain.init_weights=state")


def test_a_file_with_another_optimisers_state_is_a_start_but_not_continued(recipe, tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "repa.pt")
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in content["model"].values()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(content | {"opt": optimizer.state_dict()}, tmp_path / "repa.pt")
    told = refused(recipe, "--stage.plain.init_weights=state")
    assert "no optimiser state that can be taken over (opt is another optimiser's: of" in told
    assert "'momentum_buffer'" in told and "\n" not in told
    run(load(recipe, [*STILL, "--stage.plain.init_weights=raw"]))


def test_what_is_said_to_be_fresh_is_drawn_and_the_rest_is_taken(recipe, tmp_path):
    content = foreign.repa_checkpoint(tmp_path / "repa.pt", replace(foreign.TINY, num_classes=7))
    run(load(recipe, [*STILL, '--stage.plain.init_fresh=["y_embedder.", "final_layer."]']))
    drawn = build(load(recipe).model, kernels.select({}, torch.device("cpu")), 3).state_dict()
    for key, tensor in newest(tmp_path / "out").groups["model"].items():
        fresh = key.startswith(("y_embedder.", "final_layer."))
        assert torch.allclose(tensor, drawn[key] if fresh else content["ema"][key], rtol=0, atol=1e-20), key


def test_a_stage_starts_from_an_earlier_one_and_takes_its_heads_on_request(data, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    text = recipe.read_text()
    again = text[text.index("[[stage]]") : text.rindex("[[stage]]")].replace('"align"', '"again"')
    recipe.write_text(text[: text.rindex("[[stage]]")] + again + 'init = "align"\ninit_heads = "match"\n')
    options = ["--stage.again.init_weights=state", "--stage.align.steps=4", "--stage.again.steps=1"]
    run(load(recipe, options))
    first, second = newest(tmp_path / "out", "align"), newest(tmp_path / "out", "again")
    assert second.groups["optim"]["heads.step"] == 5 and second.groups["optim"]["model.step"] == 5
    for group in ("model", "heads"):
        moved = max((second.groups[group][k] - t).abs().max() for k, t in first.groups[group].items())
        assert 0 < moved < 0.05  # one step from there, and not from what was drawn
    assert second.meta["init"]["path"] == "align" and second.meta["init"]["layout"] == "self-transcendence"


def test_a_schedule_spans_the_stages_own_steps_whose_state_begins_elsewhere_also_after_a_resume(data, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    text = recipe.read_text()
    again = text[text.index("[[stage]]") : text.rindex("[[stage]]")].replace('"align"', '"again"')
    recipe.write_text(text[: text.rindex("[[stage]]")] + again + 'init = "align"\ninit_weights = "state"\n')
    options = ["--optim.schedule=wsd", "--optim.decay_steps=5", "--optim.lr_end=0.2", "--optim.warmup_steps=3"]
    run(load(recipe, options))
    rates = {name: [r["lr"] for r in tiny.records(tmp_path / "out", "train") if r["stage"] == name]
             for name in ("align", "again")}  # fmt: skip
    falling = [1e-2 * (1 - 0.8 * n / 5) for n in range(5)]
    assert rates["align"] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2, *falling], rel=1e-6)
    assert rates["again"] == pytest.approx([1e-2] * 5 + falling, rel=1e-6)  # the warm-up is over, the decay its own
    whole = newest(tmp_path / "out", "again")
    assert whole.said.init is not None and whole.said.init.updates == 10 and whole.groups["optim"]["model.step"] == 20
    shutil.rmtree(whole.path)
    assert newest(tmp_path / "out", "again").step == 8
    run(load(recipe, options))
    resumed = newest(tmp_path / "out", "again")
    for group, tensors in whole.groups.items():
        assert all(torch.equal(tensor, resumed.groups[group][name]) for name, tensor in tensors.items()), group


@pytest.mark.parametrize(("schedule", "decay", "least"), [("cosine", 0, 11), ("wsd", 3, 13)])
def test_a_schedule_is_refused_whose_stage_begins_within_a_warm_up_that_outlasts_it(
    schedule, decay, least, data, tmp_path
):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    text = recipe.read_text()
    recipe.write_text(text[: text.rindex("[[stage]]")])
    run(load(recipe, ["--optim.warmup_steps=20"]))
    recipe.write_text(recipe.read_text() + f'init = "{tmp_path / "out" / "align"}"\ninit_weights = "state"\n')
    options = [f"--run.out={tmp_path / 'next'}", "--optim.warmup_steps=20"]
    with pytest.raises(UserError) as refusal:
        run(load(recipe, [*options, f"--optim.schedule={schedule}", f"--optim.decay_steps={decay}"]))
    assert (
        f"after its 10 updates 10 steps of warm-up are left, and at least {max(decay, 1)} of decay follow "
        f"(optim.schedule = '{schedule}'); stage.align.steps = 10, at least {least} are needed"
    ) in str(refusal.value)


def test_further_averages_are_kept_resumed_started_from_and_drawn_from_by_their_decay(data, tmp_path, capsys):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    text = recipe.read_text()
    recipe.write_text(text[: text.rindex("[[stage]]")] + '[[stage]]\nname = "next"\nsupervision = "none"\nsteps = 1\n'
                      'init = "align"\n')  # fmt: skip
    options = ["--optim.ema_decay=0.3", "--optim.ema_decays=[0.45, 0.2]", "--optim.ema_warmup=true"]
    out, groups = tmp_path / "out", ("ema", "ema-0.45", "ema-0.2")
    run(load(recipe, options))
    whole, following = newest(out, "align"), newest(out, "next")
    assert {*groups, "model", "optim", "heads"} == set(whole.groups)
    for one, other in itertools.combinations(["model", *groups], 2):
        assert not torch.equal(whole.groups[one]["x_embedder.proj.bias"], whole.groups[other]["x_embedder.proj.bias"])
    for group in groups:  # after one update all decays are 1/10, from the average that was taken over
        for key, tensor in following.groups[group].items():
            expected = whole.groups["ema"][key] / 10 + 0.9 * following.groups["model"][key]
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    convert([str(out), "--stage", "align"])
    assert "\n  further averages are left out: ema-0.2, ema-0.45\n" in capsys.readouterr().out
    shutil.rmtree(whole.path)
    shutil.rmtree(out / "next")
    run(load(recipe, options))
    for group, tensors in newest(out, "align").groups.items():
        assert all(torch.equal(tensor, whole.groups[group][key]) for key, tensor in tensors.items()), group
    for group in groups:
        read = of_run(out, "align", None, group).weights()
        assert read.averaged and all(torch.equal(t, whole.groups[group][key]) for key, t in read.tensors.items())
    with pytest.raises(UserError, match=r"^--weights ema-0.9: .*out has ema, raw, ema-0.45, ema-0.2$"):
        of_run(out, "align", None, "ema-0.9")


@dataclass(frozen=True)
class OwnSettings(Method):
    """A method from outside whose heads have keys of their own."""

    implementation: ClassVar[str] = f"{__name__}:Own"
    tap: ClassVar[int] = 1
    selection: ClassVar[Selection] = Selection(EVERYWHERE, "sample", 0.5)


class Own(Supervision):
    """mean_n ‖head(h)‖², by layers that are named like nothing else and like a SiT's own."""

    def __init__(self, settings: OwnSettings, parts: Parts) -> None:
        super().__init__(settings, parts)
        width = parts.config.width
        self.heads = nn.ModuleDict({"decoder": nn.Linear(width, width), "blocks": nn.ModuleList([nn.Linear(width, 3)])})
        self.heads["final_layer"] = nn.ModuleDict({"linear": nn.Linear(3, 5)})  # a key that the trunk has, too

    def active(self, step):
        return True

    def target(self, batch):
        return ()

    def loss(self, hidden, target, batch):
        out = self.heads["final_layer"]["linear"](self.heads["blocks"][0](self.heads["decoder"](hidden)))
        return (batch.rows.weight * out.float().square().mean((1, 2))).sum()


def test_a_method_brings_its_own_heads_whatever_their_keys(data, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "own", OwnSettings)
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    stage = '[[stage]]\nname = "{}"\nsupervision = "own"\nsteps = {}\n'
    begun = 'init = "first"\ninit_heads = "match"\ninit_weights = "state"\n'
    text = recipe.read_text()
    recipe.write_text(
        text[: text.index("[[stage]]")] + stage.format("first", 4) + stage.format("again", 1) + begun
        + stage.format("plain", 1).replace("own", "none") + 'init = "first"\n'
    )  # fmt: skip
    run(load(recipe))
    first, again, plain = (newest(tmp_path / "out", name).groups for name in ("first", "again", "plain"))
    assert {"decoder.weight", "blocks.0.weight", "final_layer.linear.weight"} <= set(first["heads"])
    assert again["optim"]["heads.step"] == 5 and "heads" not in plain and set(plain["model"]) == set(first["model"])
    for group in ("model", "heads"):
        moved = max((again[group][key] - tensor).abs().max() for key, tensor in first[group].items())
        assert 0 < moved < 0.05  # one step from there, and not from what was drawn
    for layout in ("repa", "sra"):
        found = tmp_path / f"{layout}.safetensors"
        export_file(read_model(tmp_path / "out", print, "first").loaded, layout, found, "model")
        assert set(load_file(found)) == set(first["model"])  # another project could not load such heads


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("init", "nowhere", "no stage of that name"),
        ("init", "plain", "can't start from itself"),
        ("init_weights", "best", 'one of "ema", "raw", "state"'),
        ("init_fresh", '["a", "a"]', "none empty and none twice"),
    ],
)
def test_bad_keys_are_refused_by_the_recipe(key, value, words, recipe):
    with pytest.raises(RecipeError, match=f"stage.plain.{key}") as caught:
        load(recipe, [f"--stage.plain.{key}={value}"])
    assert words in str(caught.value)


def test_a_start_that_is_not_there_is_told_with_its_key(recipe, tmp_path):
    told = refused(recipe)
    assert told.startswith(f"stage.plain.init = '{tmp_path}/repa.pt': there is nothing; a .pt or .safetensors file")


def test_the_other_keys_need_an_init(recipe):
    with pytest.raises(RecipeError, match="without init nothing is read"):
        load(recipe, ["--stage.plain.init=", "--stage.plain.init_heads=match"])


MODERN = (
    "--model.norm=rms_affine", "--model.position=rope", "--model.mlp=relu2", "--model.qk_norm=rms",
    "--model.qkv_bias=false", "--model.value_residual=true", "--model.registers=2",
)  # fmt: skip


def test_a_modern_network_is_saved_resumed_and_read_as_it_was(data, tmp_path):
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "whole")
    run(load(path, MODERN))
    stopped = [*MODERN, f"--run.out={tmp_path / 'stopped'}"]
    run(load(path, [*stopped, "--stage.transcend.steps=4"]))
    run(load(path, stopped))
    whole, resumed = (
        checkpoint.latest(tmp_path / name / "transcend" / "checkpoints", print) for name in ("whole", "stopped")
    )
    for group, tensors in whole.groups.items():
        assert all(torch.equal(tensor, resumed.groups[group][key]) for key, tensor in tensors.items()), group
    loaded = read_model(tmp_path / "whole", print).loaded
    assert loaded.config.architecture() == load(path, MODERN).model.architecture()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.norm=rms", "norm layer (this recipe: rms)"),
        ("--model.position=both", "position sincos (this recipe: both)"),
        ("--model.mlp=relu2", "mlp gelu (this recipe: relu2)"),
        ("--model.value_residual=true", "value_residual False (this recipe: True)"),
    ],
)
def test_an_option_that_differs_is_named_though_no_shape_tells_it(data, tmp_path, option, words):
    path = tiny.write_recipe(tmp_path / "t.toml", data, tmp_path / "out")
    run(load(path, ["--stage.align.steps=1", "--stage.transcend.steps=1"]))
    for key, where in (("init", "align"), ("teacher", "transcend")):
        place = f"{tmp_path / 'out' / 'align'}"
        with pytest.raises(UserError, match=re.escape(f"another architecture: {words}")) as error:
            run(load(path, [option, f"--run.out={tmp_path / key}", f"--stage.{where}.{key}={place}"]))
        assert "\n" not in str(error.value)

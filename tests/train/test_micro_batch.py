"""`optim.micro_batch`: what "auto" chooses for the memory there is, and a run that backs off is one run to the bit."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from st_fast.core import checkpoint
from st_fast.core.checkpoint.meta import Meta, MicroBatch
from st_fast.core.errors import EXIT_FAILED, RunFailed
from st_fast.core.ranks import Ranks
from st_fast.recipe import Recipe, RecipeError, cost, load, to_toml
from st_fast.recipe.batch import possible_passes, with_passes_of
from st_fast.recipe.schema import Optim
from st_fast.train import __main__ as train
from st_fast.train import choices, memory
from st_fast.train import run as runs
from st_fast.train.memory import choose_micro_batch, halved
from st_fast.train.run import run
from st_fast.train.step import Losses, Step
from st_fast.train.trainer import StageTrainer
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = tiny.ROOT / "recipes" / "sit_xl_dispersive.toml"
"""Compares all samples of a batch, so that a rank's share is one pass."""
RECIPES = sorted({*(tiny.ROOT / "recipes").glob("sit_*.toml")} - {WHOLE})
GIB = 2**30
AUTO = "--optim.micro_batch=auto"
GRAPHS = ("--run.cuda_graphs=true", "--run.supervised_rows=padded")
STAGES = ("align", "transcend")


@dataclass(frozen=True)
class Team(Ranks):
    """One rank of several whose sums have the other ranks' numbers added."""

    others: tuple[float, ...] = ()

    def sum(self, values: Tensor) -> Tensor:
        values[[n for n in range(self.count) if n != self.rank]] += torch.tensor(self.others, dtype=values.dtype)
        return values

    def broadcast_from_rank0(self, say: Callable[[], object]) -> object:
        return say()


def on_a_card(gibibytes: float, monkeypatch) -> None:
    """Makes this process believe that so much memory is its own."""
    monkeypatch.setattr(memory, "capacity", lambda device: int(gibibytes * GIB))


def chosen(
    recipe: Recipe, ranks: Ranks, dtype: torch.dtype = torch.bfloat16, kept: tuple[int, int] = (0, 0)
) -> tuple[Recipe, list[str]]:
    said: list[str] = []
    return choose_micro_batch(recipe, ranks, dtype, kept, said.append)[0], said


def one_of(count: int, gibibytes: float) -> Ranks:
    others = (gibibytes * GIB,) * (count - 1)
    return Team(0, count, torch.device("cpu"), others=others)


# What is chosen


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_shipped_recipe_fits_one_80_gb_card_in_every_stage(path, tmp_path, monkeypatch):
    on_a_card(78, monkeypatch)
    recipe, said = chosen(load(path, [f"--run.out={tmp_path}"]), Ranks(0, 1, torch.device("cpu")))
    for stage in recipe.stages:
        assert sum(cost.memory_bytes(replace(recipe, stages=(stage,)), 1, bf16=True)) <= 0.9 * 78 * GIB
    images = 256 // recipe.optim.accumulation
    taken = sum(cost.memory_bytes(recipe, 1, bf16=True)) / GIB
    assert f"{images} on one 80 GB card, {taken:.1f} of 78 GiB by estimate" in path.read_text()
    assert said == [
        f"micro-batch {images}: {recipe.optim.accumulation} pass{'es' * (images < 256)} a step; "
        f"by estimate {taken:.1f} of 78.0 GiB"
    ]


def test_a_batch_that_must_be_one_pass_takes_two_cards():
    one, two = (sum(cost.memory_bytes(load(WHOLE, ranks=ranks), ranks, bf16=True)) / GIB for ranks in (1, 2))
    assert two <= 0.9 * 78 < one and f"takes {one:.0f} GiB by estimate" in WHOLE.read_text().replace("\n", " ")


def test_xl_at_its_published_batch_is_two_passes_on_one_80_gb_card(tmp_path, monkeypatch):
    on_a_card(78, monkeypatch)
    recipe, said = chosen(
        load(tiny.ROOT / "recipes" / "sit_xl.toml", [f"--run.out={tmp_path}"]), Ranks(0, 1, torch.device("cpu"))
    )
    assert recipe.optim.accumulation == 2 and recipe.optim.micro_batch == 0
    assert said[0].startswith("micro-batch 128: 2 passes a step; by estimate 57.")


@pytest.mark.parametrize("size", ["sit_s", "sit_b", "sit_xl"])
@pytest.mark.parametrize(("batch", "count"), [(252, 1), (252, 2), (252, 3), (250, 2), (257, 1), (96, 3)])
@pytest.mark.parametrize("gibibytes", [23, 40, 139])
def test_the_fewest_even_passes_that_fit_are_chosen(size, batch, count, gibibytes, tmp_path, monkeypatch):
    recipe = load(
        tiny.ROOT / "recipes" / f"{size}.toml", [f"--optim.batch_size={batch}", f"--run.out={tmp_path}"], ranks=count
    )
    on_a_card(gibibytes, monkeypatch)
    found = chosen(recipe, one_of(count, gibibytes))[0].optim.accumulation
    even = [n for n in range(1, batch + 1) if batch % (n * count) == 0]

    def taken(passes: int) -> int:
        split = replace(recipe, optim=replace(recipe.optim, micro_batch=0, accumulation=passes))
        return sum(cost.memory_bytes(split, count, bf16=True))

    assert found == min(n for n in even if taken(n) <= 0.9 * gibibytes * GIB)


def test_every_rank_takes_what_fits_the_rank_with_the_least_memory(tmp_path, monkeypatch):
    options = ["--optim.batch_size=384", f"--run.out={tmp_path}"]
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml", options, ranks=3)
    on_a_card(78, monkeypatch)
    least = Team(1, 3, torch.device("cpu"), others=(139.0 * GIB, 30.0 * GIB))
    on_30 = cost.largest_micro_batch(recipe, 3, True, 30 * GIB)
    assert 384 // (3 * chosen(recipe, least)[0].optim.accumulation) == on_30 < 128


def test_a_number_is_the_images_of_a_pass_and_leaves_the_batch_as_it_is(tmp_path):
    recipe = load(tiny.ROOT / "recipes" / "sit_b.toml", ["--optim.micro_batch=32"], ranks=2)
    found, said = chosen(recipe, one_of(2, 1))
    assert (found.optim.accumulation, found.optim.micro_batch, found.optim.batch_size, said) == (4, 0, 256, [])


def test_without_the_key_accumulation_decides():
    recipe = load(tiny.ROOT / "recipes" / "sit_b.toml", ["--optim.micro_batch=0", "--optim.accumulation=8"])
    assert chosen(recipe, one_of(1, 0.001)) == (recipe, [])


def test_a_card_with_too_little_memory_for_one_image_is_told_before_anything_begins(tmp_path):
    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    with pytest.raises(RunFailed) as failure:
        run(load(recipe, [AUTO, "--model.mlp_ratio=1000", "--model.width=8192"]))  # hundreds of GiB
    line = str(failure.value)
    assert failure.value.exit_code == EXIT_FAILED and "\n" not in line
    assert "too little memory for one image a pass: 90 % of" in line and "weights and state take" in line
    assert not (tmp_path / "out" / "recipe.toml").exists() and not (tmp_path / "out" / "align").exists()


# With other keys


def test_cuda_graphs_want_the_whole_share_in_one_pass_and_that_is_told_once_it_is_chosen(tmp_path, monkeypatch):
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml", [*GRAPHS, f"--run.out={tmp_path}"])
    on_a_card(78, monkeypatch)
    with pytest.raises(RecipeError) as refusal:
        chosen(recipe, one_of(1, 78))
    assert 'optim.micro_batch = "auto": by the memory there is, 128 images a pass' in str(refusal.value)
    assert "run.cuda_graphs = true needs it" in str(refusal.value) and "\n" not in str(refusal.value)
    on_a_card(139, monkeypatch)
    assert chosen(recipe, one_of(1, 139))[0].optim.accumulation == 1


def test_nobody_backs_off_where_ranks_or_graphs_exclude_it_nor_twice_nor_below_one_image():
    recipe = load(tiny.ROOT / "recipes" / "sit_b.toml")
    smaller, choice = halved(with_passes_of(36, load(RECIPES[0], ["--optim.batch_size=252"]), 1), MicroBatch(36, 1))
    assert (choice, smaller.optim.accumulation) == (MicroBatch(28, 1, halved=True), 9)
    assert halved(recipe, None) is None
    assert halved(recipe, MicroBatch(128, 2)) is None
    assert halved(recipe, MicroBatch(128, 1, halved=True)) is None
    assert halved(recipe, MicroBatch(1, 1)) is None
    graphs = load(tiny.ROOT / "recipes" / "sit_b.toml", [*GRAPHS, "--optim.micro_batch=0"])
    assert halved(graphs, MicroBatch(256, 1)) is None


def test_the_passes_of_a_share_are_all_its_divisors():
    optim = load(RECIPES[0], ["--optim.batch_size=720"]).optim
    for ranks in (1, 2, 3):
        share = 720 // ranks
        assert possible_passes(optim, ranks) == [n for n in range(share, 0, -1) if share % n == 0]


def test_a_dry_run_loads_no_kernels_which_may_have_to_be_compiled_first():
    recipe = Path(__file__).parents[2] / "recipes" / "mmdit_coco.toml"
    code = (
        f"import sys; from st_fast.train.__main__ import main; main([{str(recipe)!r}, '--dry-run']); "
        "print('loaded', 'st_fast.train.memory' in sys.modules, 'st_fast.kernels._ops' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded True False\n")


def test_a_dry_run_says_what_would_be_chosen_here_or_on_an_80_gb_card(monkeypatch):
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = train.summary(recipe, 1)
    assert "128 images a pass, 2 a step (no GPU here; on a card with 78.0 GiB)" in text
    fixed, activations = (
        f"{size / GIB:.2f} GiB" for size in cost.memory_bytes(with_passes_of(128, recipe, 1), 1, True)
    )
    assert f"{fixed} weights and state + {activations} activations of 128 images" in text
    assert "images a pass, 1 a step (cpu, " in train.summary(
        load(RECIPES[0], ["--run.device=cpu", "--optim.batch_size=2"]), 1
    )


# Backing off


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data") / "latents")


class Shortage:
    """Lets memory lack for passes of more than `most` images at the step that comes when `calls` steps were made.

    `held` refers to what the failed pass has allocated, `begun` counts the passes of every size.
    """

    def __init__(self, monkeypatch, step: int, most: int, stage: str = "align", dies: tuple[str, int] | None = None):
        self.held: list[weakref.ref[object]] = []
        self.sizes: dict[tuple[str, int], set[int]] = {}
        losses = Step.losses

        def scarce(this: Step, batch, target) -> Losses:
            found = losses(this, batch, target)
            place, size = (this.heartbeat.stage, this.heartbeat.step), len(batch.t)
            if place == dies:
                raise RuntimeError("the process is killed here")
            if place[0] == stage and place[1] >= step and size > most:
                large = torch.empty(1_000_003)
                self.held += [weakref.ref(large), weakref.ref(found.denoise), weakref.ref(this)]
                raise torch.OutOfMemoryError("no memory is left for this")
            self.sizes.setdefault(place, set()).add(size)
            return found

        monkeypatch.setattr(Step, "losses", scarce)


def states(out: Path) -> dict[str, Tensor]:
    found = {stage: checkpoint.latest(out / stage / "checkpoints", pytest.fail) for stage in STAGES}
    return {f"{s}/{g}/{k}": t for s, c in found.items() if c for g, ts in c.groups.items() for k, t in ts.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def truth(data, tmp_path_factory) -> Path:
    """A run whose passes were set by hand: 8 images up to step 5 of stage 1, and 4 from then on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("truth")
    path = tiny.write_recipe(folder / "tiny.toml", data, folder / "out")
    text = path.read_text()
    path.write_text(text[: text.rindex("[[stage]]")])
    run(load(path, ["--stage.align.steps=5"]))
    path.write_text(text)
    run(load(path, ["--optim.micro_batch=4"]))
    torch.set_num_threads(before)
    return folder / "out"


def recipe_for(data: Path, folder: Path, *options: str) -> Recipe:
    return load(tiny.write_recipe(folder / "tiny.toml", data, folder / "out"), [AUTO, *options])


def test_a_run_that_backs_off_is_to_the_bit_the_run_with_these_passes(data, truth, tmp_path, monkeypatch, capsys):
    shortage = Shortage(monkeypatch, step=6, most=4)
    run(recipe_for(data, tmp_path))
    said = capsys.readouterr().out
    assert said.count("micro-batch 8: 1 pass a step; by estimate") == 1
    line = "align: out of memory at step 6 with 8 images a pass; going on after step 5 with 4, 2 passes a step"
    assert said.count("out of memory") == said.count(line) == 1
    assert {place: max(sizes) for place, sizes in shortage.sizes.items()} == {
        **{("align", n): 8 if n < 6 else 4 for n in range(1, 11)},
        **{("transcend", n): 4 for n in range(1, 11)},
    }
    assert same(states(tmp_path / "out"), states(truth))
    starts = tiny.records(tmp_path / "out", "start")
    assert [(r["stage"], r["resumed_from"], r["micro_batch"]) for r in starts] == [
        ("align", 0, 8), ("align", 5, 4), ("transcend", 0, 4),
    ]  # fmt: skip


def test_what_comes_of_other_passes_differs_in_the_last_bits_at_least(data, truth, tmp_path):
    """Otherwise the tests of equal bits would show nothing."""
    run(recipe_for(data, tmp_path))
    assert not same(states(tmp_path / "out"), states(truth))


@pytest.mark.parametrize("dies", [("align", 7), ("transcend", 3)], ids=str)
def test_an_interrupted_run_goes_on_with_the_passes_it_backed_off_to(dies, data, truth, tmp_path, monkeypatch):
    """Also where all the memory is there again: with the passes of 8 that would fit then, bits would differ."""
    recipe = recipe_for(data, tmp_path)
    with monkeypatch.context() as patched:
        Shortage(patched, step=6, most=4, dies=dies)
        with pytest.raises(RuntimeError, match="is killed here"):
            run(recipe)
    run(recipe)
    assert same(states(tmp_path / "out"), states(truth))


def test_a_run_killed_before_any_checkpoint_backs_off_again_at_the_same_step(data, truth, tmp_path, monkeypatch):
    recipe = recipe_for(data, tmp_path)
    with monkeypatch.context() as patched:
        Shortage(patched, step=99, most=4, dies=("align", 3))
        with pytest.raises(RuntimeError, match="is killed here"):
            run(recipe)
    Shortage(monkeypatch, step=6, most=4)
    run(recipe)
    assert same(states(tmp_path / "out"), states(truth))


SHORT = ("--stage.align.steps=4", "--stage.transcend.steps=2")


def test_memory_that_lacks_at_the_first_step_saves_nothing_and_begins_anew(data, tmp_path, monkeypatch, capsys):
    Shortage(monkeypatch, step=1, most=4)
    run(recipe_for(data, tmp_path, *SHORT))
    assert "going on after step 0 with 4, 2 passes a step" in capsys.readouterr().out
    byhand = tmp_path / "byhand"
    byhand.mkdir()
    run(load(tiny.write_recipe(byhand / "tiny.toml", data, byhand / "out"), [*SHORT, "--optim.micro_batch=4"]))
    assert same(states(tmp_path / "out"), states(byhand / "out"))


def test_a_second_lack_of_memory_ends_the_run_in_one_line_also_after_a_restart(data, tmp_path, monkeypatch):
    recipe = recipe_for(data, tmp_path)
    Shortage(monkeypatch, step=6, most=2)
    for _ in range(2):
        with pytest.raises(RunFailed) as failure:
            run(recipe)
        line = str(failure.value)
        assert "out of memory on cpu at align step 6 with 4 images a pass" in line and "\n" not in line
        assert "--optim.micro_batch=2 makes it 2 a pass" in line
    assert checkpoint.latest(tmp_path / "out" / "align" / "checkpoints", pytest.fail).step == 5
    run(load(tmp_path / "tiny.toml", ["--optim.micro_batch=2"]))


def test_without_auto_nothing_backs_off(data, tmp_path, monkeypatch):
    Shortage(monkeypatch, step=6, most=4)
    path = tiny.write_recipe(tmp_path / "tiny.toml", data, tmp_path / "out")
    with pytest.raises(RunFailed, match=r"with 8 images a pass in .* --optim\.micro_batch=4 makes it 4 a pass"):
        run(load(path))
    with pytest.raises(RunFailed, match="with 8 images a pass in"):
        run(load(path, ["--optim.micro_batch=8"]))


def test_memory_that_lacks_outside_of_a_pass_is_no_reason_to_back_off(data, tmp_path, monkeypatch):
    """In the update weights may be half written, and in sampling other passes would not help."""

    def update(this: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory is left for this")

    monkeypatch.setattr("st_fast.train.optim.Optimizer.update", update)
    with pytest.raises(RunFailed, match="out of memory on cpu at align step 1 with 8 images a pass"):
        run(recipe_for(data, tmp_path))
    assert not (tmp_path / "out" / "align" / "checkpoints").exists()


def test_what_the_failed_pass_has_allocated_is_free_before_anything_is_saved(data, tmp_path, monkeypatch):
    shortage, alive, save = Shortage(monkeypatch, step=3, most=4), dict[int, list[object]](), StageTrainer.save

    def seen(trainer: StageTrainer, step: int, clock) -> None:
        alive.setdefault(step, [reference() for reference in shortage.held[:2]])
        save(trainer, step, clock)

    monkeypatch.setattr(StageTrainer, "save", seen)
    run(recipe_for(data, tmp_path, *SHORT))
    assert alive[2] == [None, None]


def test_the_failed_pass_and_its_trainer_are_let_go_before_the_next_try(data, tmp_path, monkeypatch, thawed):
    shortage, alive, begin = Shortage(monkeypatch, step=3, most=4), list[list[object]](), runs.run_stage

    def seen(context, stage) -> None:
        alive.append([reference() for reference in shortage.held])
        begin(context, stage)

    monkeypatch.setattr(runs, "run_stage", seen)
    run(recipe_for(data, tmp_path, *SHORT))
    assert len(shortage.held) == 3 and alive[1] == [None, None, None]
    assert gc.get_freeze_count() == 0


# What a run keeps


def test_the_run_folder_keeps_the_recipe_as_it_was_given(data, tmp_path):
    recipe = recipe_for(data, tmp_path, "--stage.align.steps=1", "--stage.transcend.steps=1")
    run(recipe)
    assert load(tmp_path / "out" / "recipe.toml") == recipe and 'micro_batch = "auto"' in to_toml(recipe)


def keep(record: MicroBatch | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the newest checkpoint had this record of a choice."""
    monkeypatch.setattr(choices, "newest_meta", lambda recipe: Meta(micro_batch=record))


XL_ON_78 = MicroBatch(128, 1)


@pytest.mark.parametrize(
    ("record", "gibibytes", "images", "again"),
    [
        (XL_ON_78, 78, 128, True),
        (XL_ON_78, 62, 128, True),  # others take more than at the first start; anew it would be 64
        (XL_ON_78, 139, 128, True),
        (replace(XL_ON_78, images=64, halved=True), 78, 64, True),
        (XL_ON_78, 57, 64, False),  # another card
        (replace(XL_ON_78, ranks=2), 78, 128, False),
        (replace(XL_ON_78, ranks=2), 139, 256, False),
        (replace(XL_ON_78, images=100), 139, 256, False),
        (None, 139, 256, False),
    ],
)
def test_a_run_that_goes_on_keeps_its_choice_while_ranks_and_memory_allow(
    record, gibibytes, images, again, monkeypatch
):
    on_a_card(gibibytes, monkeypatch)
    keep(record, monkeypatch)
    recipe, said = chosen(load(tiny.ROOT / "recipes" / "sit_xl.toml"), one_of(1, gibibytes))
    assert 256 // recipe.optim.accumulation == images and said[0].endswith("as before") == again


@pytest.mark.parametrize(("name", "option"), [("sit_xl", ""), ("sit_b", "block"), ("digits", "block")])
def test_a_batch_that_splits_badly_is_named_with_what_would_fit(name, option, monkeypatch):
    path = tiny.ROOT / "recipes" / f"{name}.toml"
    options = [AUTO, "--optim.batch_size=257", f"--run.checkpointing={option or 'none'}"]

    def taken(images: int) -> int:
        alone = load(path, [*options, f"--optim.batch_size={images}", "--optim.micro_batch=0"])
        return sum(cost.memory_bytes(alone, 1, True))

    room = (taken(150) + 1) / cost.MEMORY_SHARE / GIB
    on_a_card(room, monkeypatch)
    recipe, (line,) = chosen(load(path, options), one_of(1, room))
    assert recipe.optim.accumulation == 257
    fits = int(re.search(r"; (\d+) would fit, but a pass must divide the 257 images of a rank$", line)[1])
    assert taken(fits) <= taken(150) < taken(fits + 1)
    assert "would fit" not in chosen(load(path, [*options, "--optim.batch_size=256"]), one_of(1, room))[1][0]


def test_data_that_may_stay_on_the_device_change_a_new_choice_and_no_recorded_one(monkeypatch):
    recipe, half = load(tiny.ROOT / "recipes" / "sit_xl.toml"), int(0.4 * 78 * GIB)
    on_a_card(78, monkeypatch)
    assert chosen(recipe, one_of(1, 78), kept=(0, half))[0].optim.accumulation == 4
    keep(MicroBatch(128, 1), monkeypatch)
    for kept, again in (((0, half), True), ((half, half), False)):
        found, (line,) = chosen(recipe, one_of(1, 78), kept=kept)
        assert line.endswith("as before") == again and found.optim.accumulation == (2 if again else 4)
    keep(MicroBatch(8, 1), monkeypatch)
    assert "would fit" not in chosen(recipe, one_of(1, 78))[1][0]  # smaller because it was so before


def test_a_huge_batch_costs_no_time():
    start = time.process_time()
    found = possible_passes(Optim(batch_size=10**18), 1)
    assert time.process_time() - start < 1.0 and found[0] == 10**18 and found[-1] == 1

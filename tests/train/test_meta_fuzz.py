"""The metadata of a checkpoint, spoilt under a digest that fits: what goes on is what it says, or the one before it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from st_fast.core.checkpoint.store import digest_of, read_manifest
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.recipe import load
from st_fast.train import choices, memory
from st_fast.train import run as runs
from st_fast.train.context import RunContext
from st_fast.train.continuity import Changes, check_recipe
from st_fast.train.log import Clock, Skips, SpikeDetector
from st_fast.train.trainer import StageTrainer
from tests import tiny
from tests.core.checkpoint.test_checkpoint_fuzz import damaged_value
from tests.fuzz import blocks, watched

AT_ONCE = 25
OPTIONS = ("--optim.micro_batch=auto", "--run.spike_ratio=2", "--run.spike_retries=3")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageTrainer]:
    """Of a stage that has a teacher, checkpoints of 4 and 8 steps, and two steps to go."""
    folder, contexts, threads = tmp_path_factory.mktemp("begun"), list[RunContext](), torch.get_num_threads()
    torch.set_num_threads(1)
    begin = runs.run_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "matmul_rate", lambda device, dtype: 1e11)
        patch.setattr(runs, "run_stage", lambda context, stage: (contexts.append(context), begin(context, stage)))
        recipe = tiny.write_recipe(folder / "tiny.toml", tiny.write_data(folder / "data"), folder / "out")
        runs.run(load(recipe, [*OPTIONS, "--stage.transcend.steps=8"]))
    whole = load(recipe, OPTIONS)
    (folder / "out" / "recipe.toml").unlink()  # or the checkpoint's would not be all that is compared
    found = StageTrainer(
        replace(contexts[-1], recipe=replace(contexts[-1].recipe, stages=whole.stages)), whole.stages[1]
    )
    yield found
    found.features.close()
    torch.set_num_threads(threads)


def goes_on(trainer: StageTrainer) -> int:
    """What a run does with its newest checkpoint at its start; the step that the stage goes on from."""
    context, stage = trainer.context, trainer.stage
    changes = Changes(False, context.log)
    check_recipe(context.recipe, changes)
    memory.recorded(context.recipe, 1)
    choices.newest_meta(context.recipe)
    trainer.spikes, trainer.skips = SpikeDetector(2.0), Skips(stage.name, 3)
    step = trainer.resume(clock := Clock())
    assert clock.seconds == trainer.trained_before and 0 <= clock.seconds < 1e10
    return step


def assert_is_what_it_says(trainer: StageTrainer, meta: dict[str, Any]) -> None:
    """The state of a trainer that has gone on, against the JSON; what is absent counts as nothing."""
    guard = meta.get("guard", {"skips": {"total": 0, "in_row": 0}, "spikes": {"usual": [], "high": 0, "found": None}})
    assert (trainer.trained_before, trainer.rollbacks) == (meta.get("seconds", 0), meta.get("rollbacks", 0))
    assert trainer.rolled_back_at == guard.get("rolled_back_at", 0)
    assert vars(trainer.skips.state()) == {key: guard["skips"][key] for key in ("total", "in_row")}
    spikes = vars(trainer.spikes.state())
    assert spikes | {"usual": list(spikes["usual"])} == {key: guard["spikes"][key] for key in spikes}
    assert (trainer.origin is None) == (meta.get("init") is None)


@pytest.mark.parametrize("block", blocks(1, 40))
def test_spoilt_metadata_is_true_or_passed_over(
    block: int, trainer: StageTrainer, capsys: pytest.CaptureFixture
) -> None:
    newest = trainer.folder / "checkpoints" / "00000008"
    file: Path = newest / "manifest.json"
    good = file.read_bytes()
    content = json.loads(good)
    try:
        for number in range(AT_ONCE):
            draw, meta = random.Random(seed := 10_000 * block + number), content["meta"]
            for _ in range(draw.choice((1, 1, 2, 4))):
                meta = damaged_value(meta, draw)
            forged = {**content, "meta": meta}
            file.write_text(json.dumps(forged | {"digest": digest_of(forged)}))
            capsys.readouterr()
            step = None
            with watched("checkpoint meta, resumed", sum(one.stat().st_size for one in newest.iterdir())):
                step = goes_on(trainer)
            said = capsys.readouterr().out
            try:
                read_manifest(newest)
            except BadFile as error:
                assert step == 4 and said.count(" is broken, ") == 1 and str(error) in said, f"seed {seed}"
                continue
            assert step in (8, None) and "broken" not in said, f"seed {seed}"
            if step == 8:
                assert_is_what_it_says(trainer, meta)
    except Exception as error:
        error.add_note(f"seed {seed}: {meta!r}"[:2_000])
        raise
    finally:
        file.write_bytes(good)


def test_the_metadata_as_it_was_written_goes_on(trainer: StageTrainer) -> None:
    assert goes_on(trainer) == 8
    (trainer.folder / "checkpoints" / "00000008").rename(trainer.folder / "checkpoints" / "aside")
    try:
        assert goes_on(trainer) == 4
        with pytest.raises(UserError):
            trainer.roll_back(4, 5)
    finally:
        (trainer.folder / "checkpoints" / "aside").rename(trainer.folder / "checkpoints" / "00000008")

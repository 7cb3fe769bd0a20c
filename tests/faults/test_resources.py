"""FAULT 35 and 29: too little memory, kernels that fail, teachers that don't fit: one line, and nothing half made."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from st_fast import kernels
from st_fast.core import checkpoint
from st_fast.core.command import run_command
from st_fast.core.errors import EXIT_FAILED, EXIT_USAGE, RunFailed
from st_fast.core.machine import PassTooLarge, naming_lack_of_memory
from st_fast.core.ranks import Heartbeat, Ranks
from st_fast.kernels import table
from st_fast.model.smoke_test import validated_kernels
from st_fast.recipe import cost, load
from st_fast.train import adamw, memory, run
from st_fast.train.examiner import Examiner
from st_fast.train.log import Log
from tests import tiny
from tests.evaluate.test_evaluate_command import real_images
from tests.faults.ranks import finish
from tests.sample.tiny_run import make_run

CPU = Ranks(0, 1, torch.device("cpu"))


def one_line(text: str) -> str:
    """The only line that starts with the program's name; a traceback fails the test."""
    assert "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("st_fast:")]
    return line


# Out of memory


def test_a_process_that_runs_out_of_memory_says_what_would_fit_and_that_fits(one_stage):
    """For real: the address space is limited, so that the batch does not fit and its split does."""
    data, out = tiny.write_data(one_stage.parent / "many", count=1024), one_stage.parent / "out"
    command = [
        sys.executable, "-m", "st_fast.train", str(one_stage), f"--data.path={data}", "--optim.batch_size=1024",
        "--model.depth=3", "--model.mlp_ratio=512", "--stage.align.steps=1",
    ]  # fmt: skip
    limit = 5 * 2**29

    def limited(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, cwd=tiny.ROOT, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit,) * 2),
        )  # fmt: skip

    done = limited()
    assert done.returncode == EXIT_FAILED, done.stderr
    line = one_line(done.stderr)
    assert "out of memory on cpu at align step 1 with 1024 images a pass in 2." in line
    assert not (out / "align" / "checkpoints").exists()
    option = re.search(r"--optim\.micro_batch=\d+", line)
    assert option, line
    done = limited(option[0])
    assert done.returncode == 0, done.stderr


def test_two_ranks_choose_one_micro_batch_and_train_as_one_rank_does(recipe, alone, nursery):
    ranks = nursery.start(2, recipe, "--optim.micro_batch=auto")
    assert finish(ranks) == [0, 0]
    assert "micro-batch 4: 1 pass a step; by estimate" in ranks[0].text and "micro-batch" not in ranks[1].text
    ours, theirs = (tiny.records(out, "train") for out in (recipe.parent / "out", alone))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc how much the process has taken")
def test_a_run_that_has_less_memory_than_it_seemed_goes_on_with_half_the_pass(one_stage):
    """For real: from the first step on the address space is limited, so that 1024 images do not fit and 512 do."""
    data, out = tiny.write_data(one_stage.parent / "many", count=1024), one_stage.parent / "out"
    command = [
        sys.executable, "-m", "tests.faults.short_of_memory_child", str(1536 * 2**20), str(one_stage),
        f"--data.path={data}", "--optim.batch_size=1024", "--optim.micro_batch=auto", "--model.depth=3",
        "--model.mlp_ratio=512", "--stage.align.steps=2",
        "--kernels.linear=reference",  # oneDNN does not say that it is memory it lacks
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tiny.ROOT, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "micro-batch 1024: 1 pass a step; by estimate" in done.stdout
    told = "align: out of memory at step 1 with 1024 images a pass; going on after step 0 with 512, 2 passes a step"
    assert done.stdout.count("out of memory") == done.stdout.count(told) == 1
    assert [r["micro_batch"] for r in tiny.records(out, "start")] == [1024, 512]
    assert [r["step"] for r in tiny.records(out, "train")] == [1, 2]


@pytest.mark.parametrize("gibibytes", [1.0, 4.0, 24.0, 80.0])
def test_the_advice_is_the_largest_even_split_that_fits_by_the_formula(gibibytes):
    recipe, room = load(tiny.ROOT / "recipes" / "sit_xl.toml", ranks=2), int(gibibytes * 2**30)
    ranks = Ranks(0, 2, torch.device("cpu"))
    line = memory.advice(recipe, ranks, torch.bfloat16, room)
    fixed, activations = cost.memory_bytes(recipe, 2, True)
    possible = [256 // (2 * a) for a in range(2, 129) if 256 % (2 * a) == 0]
    fitting = [micro for micro in possible if fixed + micro * (activations // 128) <= 0.9 * room]
    assert "\n" not in line
    if fitting:
        assert f"--optim.micro_batch={max(fitting)} makes it {max(fitting)} a pass" in line
    else:
        assert "take more ranks or a smaller model" in line


def test_the_advice_is_a_recipe_that_is_accepted_where_graphs_allow_no_accumulation():
    graphs = ["--run.cuda_graphs=true", "--run.supervised_rows=padded"]
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml", graphs)
    line = memory.advice(recipe, Ranks(0, 1, torch.device("cpu")), torch.bfloat16, 24 * 2**30)
    options = re.findall(r"--[\w.]+=\w+", line.split(" makes it ")[0])
    assert len(options) == 2 and load(tiny.ROOT / "recipes" / "sit_xl.toml", [*graphs, *options])


def test_where_the_recipe_has_an_accumulation_the_advice_is_a_larger_one():
    recipe = load(tiny.ROOT / "recipes" / "sit_xl.toml", ["--optim.micro_batch=0", "--optim.accumulation=2"])
    line = memory.advice(recipe, CPU, torch.bfloat16, 40 * 2**30)
    assert "--optim.accumulation=8 makes it 32 a pass" in line


def test_a_card_that_others_have_filled_is_one_line_at_the_start(one_stage, monkeypatch):
    def full(device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    monkeypatch.setattr(run, "matmul_rate", full)
    with pytest.raises(
        RunFailed, match=r"^out of memory on the GPU while measuring .* \(128\.00 MiB were asked for\)$"
    ):
        run.run(load(one_stage))


ON_HOST = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000"


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "on the host while drawing"),
        (RuntimeError(f"{ON_HOST} bytes. Error code 12 (Cannot allocate memory)"),
         "on the host while drawing (9000 bytes were asked for)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "on the host while drawing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79 GiB"),
         "on cuda:3 while drawing (2.50 GiB were asked for)"),
        (RuntimeError("CUDA error: out of memory"), "on the GPU while drawing"),
        (RuntimeError("API call failed: aten::new_empty"), "while drawing"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_told_with_where_and_at_what(error, where):
    with pytest.raises(RunFailed) as told, naming_lack_of_memory("drawing"):
        raise error
    assert str(told.value) == f"out of memory {where}" and told.value.exit_code == EXIT_FAILED
    with pytest.raises(OSError, match="left on"), naming_lack_of_memory("drawing"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("step", "images a pass in"), ("all-reduce", "images a pass in"), ("build", "making the model and its"),
        ("data", "reading a batch"), ("save", "saving a checkpoint"), ("sample", "drawing or scoring"),
    ],
)  # fmt: skip
def test_only_a_training_step_blames_the_images_of_a_pass(phase, words, recipe):
    ranks = Ranks(0, 1, torch.device("cpu"), Heartbeat("align", 7, phase))
    with pytest.raises(RunFailed) as told, memory.explained(load(recipe), ranks, torch.float32):
        raise MemoryError
    line = str(told.value)
    assert words in line and "align step 7" in line and ("micro_batch" in line) == (phase in ("step", "all-reduce"))
    with pytest.raises(RunFailed, match="images a pass in"), memory.explained(load(recipe), ranks, torch.float32):
        raise PassTooLarge


def lacking(*_, **__):
    raise MemoryError


@pytest.mark.parametrize(
    ("arguments", "broken", "words"),
    [
        (["sample"], "st_fast.sample.model.sample", "drawing 4 samples at once (--batch-size takes fewer)"),
        (["sample"], "st_fast.model.stored.checkpoint.latest", "loading RUN/plain/checkpoints"),
        (["evaluate", "-n", "70"], "st_fast.evaluate.classifier.ConvNet", "training the classifier"),
        (["evaluate", "-n", "70"], "st_fast.evaluate.classifier.classifier_metrics", "scoring"),
        (["evaluate.probe"], "st_fast.evaluate.probe.together.load_split", "running probe"),
        (["train.doctor"], "st_fast.train.doctor.devices", "running doctor"),
    ],
)
def test_every_command_says_what_it_lacked_memory_for_and_none_blames_a_batch(
    arguments, broken, words, tmp_path, monkeypatch, capsys
):
    found = make_run(tmp_path)
    real_images(tmp_path / "data")
    name, *options = arguments
    module = import_module(f"st_fast.{name}" if name == "train.doctor" else f"st_fast.{name}.__main__")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(broken, lacking)
    with pytest.raises(SystemExit) as ended:
        run_command(module.main, [] if name == "train.doctor" else [str(found), *options])
    assert ended.value.code == EXIT_FAILED
    assert one_line(capsys.readouterr().err) == f"st_fast: out of memory on the host while {words}".replace(
        "RUN", str(found)
    )


def test_a_picture_and_a_score_that_lack_memory_say_so_and_training_goes_on(one_stage, monkeypatch):
    monkeypatch.setattr(Examiner, "images", lacking)
    monkeypatch.setattr(Examiner, "_check", lambda self: None)
    said = []
    monkeypatch.setattr(Log, "say", lambda self, text: said.append(text))
    run.run(load(one_stage, ["--sample.num=4", "--stage.align.steps=2"]))
    assert "align 2: no picture: out of memory on the host while drawing; training goes on" in said


def test_other_errors_are_not_taken_for_a_lack_of_memory(recipe):
    with pytest.raises(RuntimeError, match="something else"), memory.explained(load(recipe), CPU, torch.float32):
        raise RuntimeError("something else")


# Kernels


def tried(path, said):
    recipe = load(path)
    return validated_kernels(vars(recipe.kernels), recipe.model, CPU, torch.float32, said.append)


def broken_op(*arguments: object, **more: object) -> None:
    raise RuntimeError("ptxas fatal: out of registers\nand more")


@pytest.mark.parametrize("name", kernels.TABLE)
def test_a_kernel_that_fails_is_replaced_by_the_reference_and_said_so(name, recipe, monkeypatch):
    working = kernels.KernelTable(**{op: getattr(kernels, op) for op in kernels.TABLE})
    monkeypatch.setattr(kernels, "select", lambda choices, device: replace(working, **{name: broken_op}))
    said: list[str] = []
    found = tried(recipe, said)
    assert vars(found) == vars(replace(working, **{name: getattr(kernels.reference, name)}))
    assert said == [
        f"kernels: {name} does not work here (RuntimeError: ptxas fatal: out of registers); the reference takes over"
    ]


@pytest.mark.parametrize("kind", ["groups", "tokens"])
def test_a_kernel_that_fails_for_a_modulation_of_groups_or_tokens_alone_is_replaced_too(kind, recipe, monkeypatch):
    def call(x, a, gate, lengths=None):
        if gate.dim() == 3 and (lengths is not None) == (kind == "groups"):
            broken_op()
        return kernels.gate_residual(x, a, gate, lengths)

    working = kernels.KernelTable(**{op: getattr(kernels, op) for op in kernels.TABLE})
    monkeypatch.setattr(kernels, "select", lambda choices, device: replace(working, gate_residual=call))
    said: list[str] = []
    assert tried(recipe, said).gate_residual is kernels.reference.gate_residual and len(said) == 1


@pytest.mark.parametrize(("name", "told"), [("st_fast", "adamw_ema"), ("torch", "optim.implementation torch")])
def test_an_optimiser_step_that_fails_is_replaced_before_it_touches_a_weight(name, told, recipe, monkeypatch):
    broken = replace(adamw.IMPLEMENTATIONS[name], update=broken_op)
    monkeypatch.setitem(adamw.IMPLEMENTATIONS, name, broken)
    said: list[str] = []
    options = [f"--optim.implementation={name}"]
    update, norm = adamw.validated(load(recipe, options), CPU, torch.float32, said.append)
    assert update is kernels.reference.adamw_ema_ and norm is kernels.reference.grad_norm
    assert len(said) == 1 and said[0].startswith(f"kernels: {told} does not work here (RuntimeError: ptxas fatal")


def test_kernels_that_work_are_kept(recipe):
    said: list[str] = []
    found = tried(recipe, said)
    assert not said and vars(found) == vars(kernels.select({}, CPU.device))


def test_a_run_whose_kernels_all_fail_trains_with_the_reference(one_stage, monkeypatch, capsys):
    from st_fast.train.run import run

    ops = kernels.TABLE
    run(load(one_stage, [*(f"--kernels.{op}=reference" for op in ops), f"--run.out={one_stage.parent / 'plain'}"]))
    monkeypatch.setattr(table, "declared", lambda op: replace(kernels.declared(op), call=broken_op))
    run(load(one_stage, [f"--kernels.{op}=fused" for op in ops]))
    assert capsys.readouterr().out.count("the reference takes over") == len(ops)
    ours, theirs = (tiny.records(one_stage.parent / name, "train") for name in ("out", "plain"))
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]


def test_the_choice_of_noisy_latents_reaches_the_batches_and_changes_no_bit(one_stage, monkeypatch):
    from st_fast.train.run import run

    run(load(one_stage, ["--kernels.noisy_latents=fused", f"--run.out={one_stage.parent / 'fused'}"]))
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return kernels.reference.noisy_latents(*arguments)

    def declared(op):
        return replace(kernels.declared(op), definition=counted) if op == "noisy_latents" else kernels.declared(op)

    monkeypatch.setattr(table, "declared", declared)
    run(load(one_stage, ["--kernels.noisy_latents=reference"]))
    ours, theirs = (tiny.records(one_stage.parent / name, "train") for name in ("out", "fused"))
    assert len(calls) > ours[-1]["step"] and [r["loss"] for r in ours] == [r["loss"] for r in theirs]


# Teachers


def trained_teacher(alone: Path, folder: Path) -> Path:
    """A copy of the align stage of a finished run."""
    shutil.copytree(alone / "align", folder)
    return folder


def forge(stage: Path, drop: str) -> None:
    """Saves the newest checkpoint again without one tensor of its trunk, as a damaged export would be."""
    found = checkpoint.latest(stage / "checkpoints", pytest.fail)
    groups = {name: {k: t for k, t in group.items() if k != drop} for name, group in found.groups.items()}
    checkpoint.save(stage / "checkpoints", found.step + 1, groups, found.meta)


def refused(recipe: Path, nursery, teacher: Path | str, *options: str) -> str:
    ranks = nursery.start(1, recipe, f"--stage.transcend.teacher={teacher}", *options)
    assert finish(ranks) == [EXIT_USAGE], ranks[0].text
    assert not (recipe.parent / "out" / "align").exists(), "stage 1 was trained before its successor's teacher was seen"
    return one_line(ranks[0].text)


def test_a_teacher_that_is_not_there_is_told_before_anything_is_trained(recipe, nursery):
    line = refused(recipe, nursery, recipe.parent / "nowhere")
    assert str(recipe.parent / "nowhere") in line and "neither a stage" in line


def test_a_teacher_folder_without_a_checkpoint_is_refused(recipe, nursery):
    (recipe.parent / "empty").mkdir()
    assert "no sound checkpoint under" in refused(recipe, nursery, recipe.parent / "empty")


def test_a_teacher_of_another_architecture_is_refused_with_every_difference(recipe, nursery, alone, tmp_path):
    teacher = trained_teacher(alone, tmp_path / "teacher")
    line = refused(recipe, nursery, teacher, "--model.depth=4", "--model.num_classes=6")
    assert "another architecture: depth 3 (this recipe: 4), num_classes 5 (this recipe: 6)" in line


def test_a_teacher_that_lacks_any_key_of_the_trunk_is_refused_by_name(recipe, nursery, alone, tmp_path):
    teacher = trained_teacher(alone, tmp_path / "teacher")
    forge(teacher, "blocks.1.attn.qkv.weight")
    line = refused(recipe, nursery, teacher)
    assert "1 missing: 'blocks.1.attn.qkv.weight'" in line


def test_every_rank_gets_the_first_ranks_teacher(recipe, nursery, alone, tmp_path):
    """Two ranks with a teacher from outside end like the stage that has it at home."""
    teacher = trained_teacher(alone, tmp_path / "teacher")
    assert finish(nursery.start(2, recipe, f"--stage.transcend.teacher={teacher}")) == [0, 0]
    ours = [r["aux"] for r in tiny.records(recipe.parent / "out", "train") if r["stage"] == "transcend"]
    theirs = [r["aux"] for r in tiny.records(alone, "train") if r["stage"] == "transcend"]
    assert ours == pytest.approx(theirs, rel=1e-3)


# Starts


def test_every_rank_starts_from_the_model_that_the_first_rank_read(one_stage, nursery, alone):
    """Two ranks that start from a stage of another run train on as one rank does.

    A rank that had drawn its own weights would give other gradients from the first step on.
    """
    started = [f"--stage.align.init={alone}/align", "--stage.align.init_weights=raw", "--stage.align.steps=3"]
    single = one_stage.parent / "single"
    assert finish(nursery.start(1, one_stage, *started, f"--run.out={single}")) == [0]
    assert finish(nursery.start(2, one_stage, *started)) == [0, 0]
    ours, theirs = (tiny.records(out, "train") for out in (one_stage.parent / "out", single))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    drawn = tiny.records(alone, "train")[0]["loss"]
    assert abs(theirs[0]["loss"] - drawn) > 0.01 * drawn

"""`[profile]`: a trace with named ranges, a table by family of kernel, and numbers that do not change."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._C._autograd import DeviceType

from st_fast.core.errors import UserError
from st_fast.core.ranks import Ranks
from st_fast.kernels.adaln import partials
from st_fast.kernels.adaln import triton as adaln
from st_fast.kernels.feature_loss import triton as feature_loss
from st_fast.kernels.mlp import triton as mlp
from st_fast.kernels.optimiser import triton as optimiser
from st_fast.kernels.qknorm import triton as qknorm
from st_fast.recipe import load
from st_fast.recipe.error import RecipeError
from st_fast.recipe.methods import Plain
from st_fast.recipe.schema import Profile, Stage
from st_fast.train import profiling
from st_fast.train.log import Clock, Log
from st_fast.train.run import run
from tests import tiny

CPU = torch.device("cpu")
WINDOW = Profile(start=2, steps=2)
SHORT = ("--stage.align.steps=4", "--stage.transcend.steps=4", "--run.log_every=1")


def trained(folder: Path, *options: str) -> Path:
    folder.mkdir()
    recipe = tiny.write_recipe(folder / "tiny.toml", tiny.write_data(folder / "data"), folder / "out")
    torch.set_num_threads(1)
    run(load(recipe, (*SHORT, *options)))
    return folder / "out"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain") / "run")


def numbers(out: Path) -> list[tuple[float, ...]]:
    return [tuple(r[key] for key in ("denoise", "aux", "grad_norm")) for r in tiny.records(out, "train")]


def test_a_profiled_run_writes_traces_with_named_ranges_prints_tables_and_keeps_its_numbers(tmp_path, plain, capsys):
    out = trained(tmp_path / "run", "--profile.start=2", "--profile.steps=2")
    said = capsys.readouterr().out
    for stage in ("align", "transcend"):
        trace = json.loads((out / stage / "profile" / "steps-2-3.json").read_text())
        seen = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        assert seen.count("step") == 2 and all(seen.count(name) == 2 for name in profiling.RANGES)
        assert any(event["name"] == "aten::addmm" for event in trace["traceEvents"])
        assert f"{stage}: steps 2 to 3 profiled" in said
    tables = said.split("family of kernel")[1:]
    assert len(tables) == 2 and all("matrix products" in t and "optimiser" in t and "teacher" in t for t in tables)
    for record in tiny.records(out, "profile"):
        whole = sum(record["families"].values())
        assert record["first"] == 2 and record["families"]["matrix products"] > 0
        assert 0 < record["families"][profiling.OUTSIDE] < whole
        assert record["stretches"].keys() == set(profiling.RANGES)
    assert numbers(out) == numbers(plain), "profiling changes nothing"
    weights = [list(folder.glob("transcend/checkpoints/*/model*.safetensors")) for folder in (out, plain)]
    assert [p.read_bytes() for p in weights[0]] == [p.read_bytes() for p in weights[1]] != []
    assert not list(plain.glob("*/profile")) and tiny.records(plain, "profile") == []


def test_a_window_that_reaches_beyond_the_end_is_cut_there(tmp_path):
    out = trained(tmp_path / "run", "--profile.start=4", "--profile.steps=9")
    assert [r["step"] for r in tiny.records(out, "profile")] == [4, 4]
    assert (out / "align" / "profile" / "steps-4-4.json").is_file()


def test_a_start_that_no_stage_reaches_is_refused(tmp_path):
    path = tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out")
    with pytest.raises(RecipeError, match=r"profile\.start.*11"):
        load(path, ["--profile.start=11"])


def test_nsys_without_cuda_is_refused_and_auto_takes_it_only_where_nsys_started_us(monkeypatch):
    with pytest.raises(UserError, match=r'profile\.tool = "nsys": needs CUDA, this run is on cpu'):
        profiling.choose_tool(Profile(tool="nsys"), CPU)
    cuda = torch.device("cuda")
    monkeypatch.delenv(profiling.UNDER_NSYS, raising=False)
    assert profiling.choose_tool(Profile(), cuda) == "torch"
    monkeypatch.setenv(profiling.UNDER_NSYS, "123")
    assert profiling.choose_tool(Profile(), cuda) == "nsys" and profiling.choose_tool(Profile(), CPU) == "torch"
    assert profiling.choose_tool(Profile(tool="torch"), cuda) == "torch"


def test_nsys_is_told_to_begin_and_end_around_the_steps_and_their_ranges_are_nvtx(tmp_path, monkeypatch):
    """What CUDA would be asked to do, in order; the calls themselves need a GPU."""
    asked: list[str] = []

    @contextmanager
    def nvtx(name: str):
        asked.append(name)
        yield
        asked.append(f"/{name}")

    monkeypatch.setattr(profiling, "choose_tool", lambda settings, device: "nsys")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: asked.append("begin"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: asked.append("end"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    ranks, clock = Ranks(0, 1, CPU), Clock()
    clock.start()
    stage = Stage("s", Plain(), 5)
    profile = profiling.StageProfile(WINDOW, ranks, Log(tmp_path / "l", ranks), stage, tmp_path, clock)
    for step, _ in enumerate(profile.watch(iter("abcde"), 0), start=1):
        with profiling.named_range("loss"):
            pass
        profile.stepped(step)
    one = ["step", "loss", "/loss", "/step"]
    assert asked == ["synchronize", "begin", *one, *one, "synchronize", "end"]


def test_a_run_that_resumes_behind_the_window_says_so(tmp_path, capsys):
    ranks = Ranks(0, 1, CPU)
    stage = Stage("s", Plain(), 9)
    profile = profiling.StageProfile(Profile(start=2), ranks, Log(tmp_path / "l", ranks), stage, tmp_path, Clock())
    assert list(profile.watch(iter("ab"), 7)) == ["a", "b"]
    assert "s: profile.start = 2 is already past; continuing at step 8" in capsys.readouterr().out


def test_time_of_kernels_beside_one_another_counts_once():
    class Event:
        device_type, is_user_annotation = DeviceType.CPU, False

        def __init__(self, start: float, end: float) -> None:
            self.time_range = type("Span", (), {"start": start, "end": end})()

    class Profiler:
        @staticmethod
        def events() -> list[Event]:
            return [Event(0, 10), Event(5, 8), Event(9, 12), Event(20, 21)]

    assert profiling.busy(Profiler(), CPU) == pytest.approx(13e-6)


def test_every_kernel_of_ours_is_told_apart_on_a_gpu_by_its_own_name():
    """A GPU's profiler knows a Triton kernel by its function's name alone, a CUDA kernel by its qualified one."""
    kinds = {
        adaln: "adaLN",
        partials: "adaLN",
        qknorm: "qk-norm",
        feature_loss: "feature loss",
        optimiser: "optimiser",
        mlp: "GELU",
    }
    ours = {name: kind for module, kind in kinds.items() for name in vars(module) if name.endswith("_kernel")}
    ours |= {name: "SwiGLU" for name in ours if "swiglu" in name}
    written = "".join(path.read_text() for path in (tiny.ROOT / "csrc" / "cuda").iterdir())
    functions = re.findall(r"__global__ void(?:\s+__launch_bounds__\(\w+\))?\s+(\w+)\(", written)
    ours |= {f"st_fast::(anonymous namespace)::{name}(st_fast::Table)": "optimiser" for name in functions}
    assert len(ours) == 22 and {name: profiling.family(name) for name in ours} == ours


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("triton_poi_fused_addmm_gelu_0", "GELU"),
        ("triton_red_fused__scaled_dot_product_cudnn_attention_native_layer_norm_3", "compiled"),
        ("triton_tem_fused_addmm_t_5", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64_4x1x1_kernel0_0", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_other_kernels_of_a_gpu_go_where_their_time_belongs(name, kind):
    assert profiling.family(name) == kind


def test_the_script_starts_the_trainer_under_nsys_with_the_capture_range_it_drives(tmp_path):
    nsys = tmp_path / "nsys"
    nsys.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    nsys.chmod(0o755)
    script = [str(tiny.ROOT / "bench" / "nsys.sh"), "recipes/digits.toml", "--profile.start=2"]
    done = subprocess.run(script, env=os.environ | {"NSYS": str(nsys), "RANKS": "2"}, capture_output=True, text=True)
    words = done.stdout.split()
    assert words[0] == "profile" and "--capture-range=cudaProfilerApi" in words
    assert words[words.index("torchrun") :] == [
        "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "st_fast.train", "recipes/digits.toml",
        "--profile.start=2", "--profile.tool=nsys",
    ]  # fmt: skip
    done = subprocess.run(script, env=os.environ | {"NSYS": "no-such-nsys"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench/nsys.sh: no-such-nsys is not installed")


def test_every_range_of_every_step_is_opened_and_closed_in_order(tmp_path):
    opened: list[str] = []

    @contextmanager
    def opener(name: str) -> Iterator[None]:
        opened.append(name)
        yield
        opened.append(f"/{name}")

    recipe = tiny.write_recipe(tmp_path / "tiny.toml", tiny.write_data(tmp_path / "data"), tmp_path / "out")
    with profiling.recording_ranges(opener):
        run(load(recipe, ["--stage.align.steps=2", "--stage.transcend.steps=2"]))
    within = [mark for name in profiling.RANGES for mark in (name, f"/{name}")]
    assert opened == 4 * [profiling.STEP, *within, f"/{profiling.STEP}"]


def test_a_range_costs_nothing_without_a_profile():
    assert profiling.named_range("data") is profiling.named_range("teacher")


def test_no_range_is_recorded_after_an_error():
    with pytest.raises(ValueError, match="stop"), profiling.recording_ranges(lambda name: pytest.fail(name)):
        raise ValueError("stop")
    with profiling.named_range("data"):
        pass

"""The stand-in itself: it behaves like a device in all that the other tests rely on, and says what it lacks."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.stand_in import driver, gates

GIB = 2**30


def test_the_sources_compile_without_a_warning():
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    try:
        include = driver.headers()
    except driver.Unavailable as error:
        pytest.skip(str(error))
    command = ["gcc", *driver.FLAGS, "-fsyntax-only", "-isystem", str(include), *map(str, driver.sources())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_copies_arrive_whole_and_those_from_memory_that_is_not_pinned_are_told(check):
    found = check("memory")
    assert found["same"] == [True] * 4 and found["large"] == 0.0
    assert found["pageable"]["pageable_copies"] == 1 and found["pageable"]["copies"] == 2
    assert found["from_pinned"]["pageable_copies"] == 0 and found["from_pinned"]["copies"] == 1
    assert found["left"] == 0


@pytest.mark.parametrize("segments", ["False", "True"])
def test_memory_ends_where_the_device_does(check, monkeypatch, segments):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:{segments}")
    found = check("out_of_memory", gib=4.0)
    assert found["error"].startswith("CUDA out of memory. Tried to allocate 1024.00 MiB. GPU 0 has a total capacity of")
    assert found["fitted"] == 4 and 4 * GIB <= found["used"] < 4 * GIB + GIB // 4


def test_a_capture_holds_the_kernels_of_both_streams_and_forbids_waiting(check):
    found = check("captures")
    assert found["captured"]["captured"] == 3
    assert found["replayed"]["graph_launches"] == 1 and found["replayed"]["launches"] == 0
    assert "captur" in found["error"]


def test_a_device_that_has_failed_fails_for_good(check):
    said = check("broken")["said"]
    assert said[:4] == [""] * 4 and all("illegal memory access" in text for text in said[4:])


def test_a_function_that_is_missing_says_its_name(check):
    found = check("missing")
    assert "operation not supported" in found["error"]
    assert "stand-in CUDA: cudaIpcGetMemHandle is not there" in found["stderr"]


def test_every_gate_is_still_where_it_is_patched():
    code = "from tests.stand_in import gates; gates.disarm(); import importlib\n"
    code += (
        "for name in gates.GATES: importlib.import_module(name)\nfrom bench import measure; print(measure.errors(1, 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=driver.ROOT, capture_output=True, text=True)
    assert done.stdout == "(0.0, 0.0)\n", done.stderr[-2000:]


def test_a_gate_that_is_gone_is_named():
    with pytest.raises(gates.GateGone, match="has no 'worst'"):
        gates._put(gates, "worst", None)

"""What is compiled lies in the run folder, and a second start compiles nothing again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from st_fast.recipe import load
from st_fast.train import run
from tests import tiny, warm

PROGRAM = """
import sys, torch
from pathlib import Path
from st_fast.model.compiling import keep_compiled
keep_compiled(Path(sys.argv[1]))
from torch._dynamo.utils import counters  # which asks for the folder
from torch._inductor import config
config.cpp.simdlen, config.cpp.vec_isa_ok = 1, False  # else it compiles programs that ask which instructions there are
config.cpp_cache_precompile_headers = False
x = torch.ones(64)
assert torch.equal(torch.compile(lambda x: (x + 1) * 2, fullgraph=True)(x), (x + 1) * 2)
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def start(folder: Path, elsewhere: Path) -> str:
    """Hits and misses of Inductor's cache in a new process whose other folders are `elsewhere`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment |= {"TMPDIR": str(elsewhere), "HOME": str(elsewhere)}
    done = warm.run("-c", PROGRAM, folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_compiled_code_lies_in_the_folder_and_serves_the_next_start(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert start(tmp_path / "compiled", elsewhere) == "0 1"
    assert any(path.is_file() for path in (tmp_path / "compiled" / "fxgraph").rglob("*"))
    assert start(tmp_path / "compiled", elsewhere) == "1 0"
    assert not [path for path in elsewhere.rglob("*") if path.suffix in (".so", ".cpp", ".py")]


def test_a_run_keeps_it_in_its_own_folder(tmp_path, monkeypatch):
    class Told(Exception):
        pass

    def told(folder: Path) -> None:
        raise Told(folder)

    monkeypatch.setattr(run, "keep_compiled", told)
    recipe = load(tiny.write_recipe(tmp_path / "tiny.toml", tmp_path / "data", tmp_path / "out"))
    with pytest.raises(Told, match=str(tmp_path / "out" / "compiled")):
        run.run(recipe)

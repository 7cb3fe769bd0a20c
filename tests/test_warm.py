"""What a program that is forked with torch imported shares with one that `python` starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

PROGRAM = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), sorted(os.environ), sys.modules["__main__"].__dict__ is globals())
print([name for name in ("st_fast", "tests", "numpy") if name in sys.modules and name != "numpy"], sys.stdin.read())
import helper
print(helper.__file__, file=sys.stderr)
sys.stdout.flush()
"""


@pytest.mark.parametrize(
    "end", ["", "sys.exit('a word')", "sys.exit(7)", "1 / 0", "os.kill(os.getpid(), 9)", "raise SystemExit"]
)
@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_it_does_and_ends_as_a_process_of_its_own(kind: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "helper.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM + end)
    start = {"-c": ["-c", PROGRAM + end], "-m": ["-m", "program"], "file": ["program.py"]}[kind]
    env = {"PYTHONPATH": str(tmp_path / "lib"), "LC_ALL": "C.UTF-8"}
    words = [*start, "one", "--two"]
    done = warm.run(*words, cwd=tmp_path, env=env)
    true = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (true.returncode, true.stdout)
    assert done.stderr.splitlines()[-1:] == true.stderr.splitlines()[-1:]

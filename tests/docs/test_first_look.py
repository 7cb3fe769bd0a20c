"""What a command says before it imports torch, or when it is stopped by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.core.command import run_command
from tests import tiny

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # its import fails from now on
sys.argv = [sys.argv[1], *sys.argv[2:]]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", ["sample", "evaluate", "evaluate.probe"])
def test_a_run_that_is_not_there_is_told_before_torch_is_imported_and_csrc_compiled(command: str, tmp_path: Path):
    program = [sys.executable, "-c", WITHOUT_TORCH, f"st_fast.{command}", str(tmp_path / "nothing")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tiny.ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"st_fast: {tmp_path / 'nothing'}: no recipe.toml, so no run of st_fast.train, and no other model\n"
    )


def test_ctrl_c_ends_a_short_command_in_one_line(capsys: pytest.CaptureFixture[str]):
    def stopped(arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(stopped, [])
    assert ended.value.code == 130 and capsys.readouterr().err == "st_fast: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run_command(stopped, ["--debug"])


def test_a_place_that_cannot_be_is_one_line_and_what_nobody_can_mend_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda arguments: (tmp_path / "file" / "out").mkdir(), [])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"st_fast: {tmp_path / 'file' / 'out'}: Not a directory\n"

    def broken(arguments: object) -> None:
        raise OSError("the device fell over")

    with pytest.raises(OSError, match="fell over"):
        run_command(broken, [])

"""Whatever standard output and standard error are, a command goes on, and no foreign text reaches the terminal raw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.core.streams import one_line, printable
from tests import tiny

COMMAND = """
import sys
from pathlib import Path
from st_fast.core.command import run_command
from st_fast.core.errors import UserError
from st_fast.core.streams import show

def main(arguments):
    what, place = arguments
    for line in range(2_000):
        print(line, "ω – ü", "\\x1b[2J\\x9b\\udcff")
    sys.stdout.flush()
    print("progress\\r", end="", file=sys.stderr)
    if what == "show":
        show("product")
    opened = open(place, "w")  # takes no closed standard stream's number
    opened.write(str(opened.fileno()))
    opened.close()
    if what == "fail":
        raise UserError("name\\n\\x1b[31mred")

run_command(main)
"""


@pytest.fixture
def run(tmp_path):
    """Exit code, output, errors and the opened file's number of COMMAND under a shell's redirections."""

    def run(what: str, redirections: str = "", **environment: str) -> tuple[int, bytes, bytes, int]:
        place, script = tmp_path / "place", tmp_path / "command.py"
        script.write_text(COMMAND)
        line = f'exec "{sys.executable}" "{script}" {what} "{place}" {redirections}'
        env = os.environ | {"PYTHONPATH": str(tiny.ROOT)} | environment
        done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=tiny.ROOT, env=env, timeout=120)
        return done.returncode, done.stdout, done.stderr, int(place.read_text()) if place.exists() else -1

    return run


@pytest.mark.parametrize(
    "redirections", [">/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "> >(head -c 5 >/dev/null)"]
)
def test_a_closed_stream_a_full_disk_or_a_reader_that_left_changes_no_exit_code(redirections, run):
    code, _, told, number = run("work", redirections)
    assert code == 0 and b"Traceback" not in told and b"Exception" not in told, told
    assert number > 2, "a file took a standard stream's place: whatever is printed would be written into it"
    assert run("fail", redirections)[0] == 2


def test_what_was_asked_for_and_can_not_be_written_is_told_unless_its_reader_has_left(run):
    code, _, told, _ = run("show", ">/dev/full")
    assert code == 1 and told.endswith(b"st_fast: standard output: No space left on device; not all could be written\n")
    assert run("show", "> >(head -c 5 >/dev/null)")[0] == 0
    assert run("show")[1].endswith(b"product\n")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {}])
def test_nothing_is_lost_for_an_encoding_and_control_characters_are_escaped(environment, run):
    code, said, told, _ = run("fail", **environment)
    assert code == 2 and said.count(b"\n") == 2_000
    assert b"\x1b" not in said + told and rb"\x1b[2J\x9b\udcff" in said
    assert told == b"progress\rst_fast: name\\n\\x1b[31mred\n"
    if "PYTHONIOENCODING" in environment:
        assert said.isascii() and rb"\u03c9" in said


def test_control_characters_and_what_turns_text_are_shown_as_python_writes_them():
    assert printable("a\tb\nc\x1b[0m\x00\x7f\x85\u202eω") == "a\tb\nc\\x1b[0m\\x00\\x7f\\x85\\u202eω"
    assert one_line("a\r\nb") == "a\\r\\nb"


def test_a_stream_of_a_test_or_another_program_is_left_alone(capsys):
    from st_fast.core.streams import use_safe_streams

    before = sys.stdout, sys.stderr
    use_safe_streams()
    assert (sys.stdout, sys.stderr) == before and Path(os.devnull).exists()

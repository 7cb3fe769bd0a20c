"""Where a record comes from: the kind of machine, versions, and the code as git has it. Imports no torch at its top."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import st_fast
from st_fast.core.errors import EXIT_INTERRUPTED, Interrupted, RunFailed, UserError
from st_fast.core.files import shown
from st_fast.core.machine import THREADS

ROOT = Path(st_fast.__file__).resolve().parent.parent
CODE = ("st_fast", "kernels", "csrc")
"""Folders of the repository that a run's figures follow from, beside its recipe."""


@dataclass(frozen=True)
class Machine:
    """The kind of machine: times are compared within one only, and bits with the same versions only."""

    device: str
    """The processor's, or the GPU's, own name."""
    threads: int
    """That compute on a CPU."""
    instructions: str
    """The CPU's capability as torch knows it, or the GPU's architecture."""

    def __str__(self) -> str:
        return f"{self.device}, {self.threads} threads, {self.instructions}"


def machine(device: str) -> Machine:
    """This one's, of "cpu" or "cuda"."""
    import torch

    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return Machine(torch.cuda.get_device_name(), torch.get_num_threads(), f"sm_{major}{minor}")
    return Machine(cpu_name(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        found = None
    return (found[1].strip() if found else platform.processor()) or platform.machine()


def versions() -> dict[str, str]:
    """Of what computes."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


@dataclass(frozen=True)
class Code:
    """A revision, and what was changed in CODE over it: a diff as git writes it, or nothing."""

    revision: str
    changes: str


def git(*arguments: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs git in this clone; UserError where there is no git, or no clone."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, input=text, capture_output=True, text=True, encoding="utf-8",
            errors="surrogateescape",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"git can't be run ({error.strerror}): a record says of which revision it is") from None
    if check and done.returncode:
        said = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise UserError(f"git {arguments[0]}, in {ROOT}: {shown(said)}")
    return done


def current_code() -> Code:
    """Of this clone. UserError outside of one, and for a file in CODE that git doesn't know: no diff would have it."""
    if not (ROOT / ".git").exists():
        raise UserError(
            f"{ROOT}: no clone of st_fast's repository, so no revision can be named; records are made in one"
        )
    if stray := git("ls-files", "--others", "--exclude-standard", "--", *CODE).stdout.splitlines():
        raise UserError(
            f"{ROOT / stray[0]}: git doesn't know this file, so a record would lack it: git add or remove it"
        )
    return Code(git("rev-parse", "HEAD").stdout.strip(), git("diff", "--binary", "HEAD", "--", *CODE).stdout)


def check_revision(revision: str) -> None:
    """UserError where this clone has no such revision."""
    if git("cat-file", "-e", f"{revision}^{{commit}}", check=False).returncode:
        raise UserError(f"revision {revision[:12]}: this clone of st_fast has no such commit; git fetch, or clone anew")


@contextmanager
def tree_of(code: Code) -> Iterator[Path]:
    """A folder with the code as it was: this clone where it still is, else a worktree that is removed at the end.

    UserError where the revision is not there, or the diff is none that applies to it.
    """
    check_revision(code.revision)
    same = git("diff", "--quiet", code.revision, "--", *CODE, check=False).returncode == 0
    if same and not code.changes and not git("ls-files", "--others", "--exclude-standard", "--", *CODE).stdout:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="st_fast-speedrun-") as folder:
        tree = Path(folder) / "code"
        git("worktree", "add", "--detach", str(tree), code.revision)
        try:
            if code.changes:
                applied = git("-C", str(tree), "apply", "--whitespace=nowarn", "-", text=code.changes, check=False)
                if applied.returncode:
                    raise UserError(f"the record's changes.diff doesn't apply to revision {code.revision[:12]}")
            for built in (ROOT / "st_fast").glob("_csrc_*"):  # named by the hash of their sources
                shutil.copy2(built, tree / "st_fast" / built.name)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree), check=False)


def run_in(tree: Path, arguments: Sequence[str], threads: int) -> None:
    """Runs `st-fast ARGUMENTS` with the code of `tree`, on so many threads; what ends this ends it, its work saved.

    Interrupted where it was ended by a signal, RunFailed where it failed; it has said why.
    """
    numbers = {name: str(threads) for name in THREADS}
    variables = dict(os.environ) | {"PYTHONPATH": str(tree)} | numbers
    with subprocess.Popen([sys.executable, "-m", "st_fast", *arguments], env=variables) as process:
        try:
            code = process.wait()
        except BaseException:  # a signal's
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if code == EXIT_INTERRUPTED:
        raise Interrupted("the run was interrupted; the same command continues")
    if code:
        raise RunFailed(f"the run ended with exit code {code}; what is wrong stands above")


def check_line(option: str, text: str) -> None:
    """UserError for a text that is more than a cell of a table."""
    if not text.isprintable() or "|" in text or len(text) > 200:
        raise UserError(f"{option} {shown(text)}: one line of at most 200 characters, without |, is needed")

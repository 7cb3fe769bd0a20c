"""Where a record comes from: the kind of machine, versions, and the code as git has it. Imports no torch at its top."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

import st_fast
from st_fast.core.errors import EXIT_INTERRUPTED, Interrupted, RunFailed, UserError
from st_fast.core.files import shown
from st_fast.core.machine import THREADS, cpu_name

ROOT = Path(st_fast.__file__).resolve().parent.parent
PATIENCE = 6.0
"""Seconds that a run has to save what it has; before this process, which was asked to end, ends itself."""
CODE = ("st_fast", "kernels", "csrc")
"""Folders of the repository that a run's figures follow from, beside its recipe."""
SOURCES = (".py", ".cpp", ".cu", ".h")
APPLY = ("apply", "--whitespace=nowarn", "--no-ignore-whitespace")
LINKS = ("120000", "160000")
"""Modes that git has for symbolic links and for other repositories."""
SCORES = ("st_fast/study/speedrun/", "st_fast/evaluate/")
"""Code that scores: a record can't bring its own."""


@dataclass(frozen=True)
class Machine:
    """The kind of machine: times are compared within one only, and bits with the same versions only."""

    device: str
    """The processor's, or the GPU's, own name."""
    threads: int
    """That compute on a CPU."""
    instructions: str
    """The CPU's capability as torch knows it, and what csrc does instead, if it does; or the GPU's architecture."""

    def __str__(self) -> str:
        return f"{self.device}, {self.threads} threads, {self.instructions}"


def machine(device: str) -> Machine:
    """This one's, of "cpu" or "cuda"."""
    import torch

    from st_fast.kernels import native

    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return Machine(torch.cuda.get_device_name(), torch.get_num_threads(), f"sm_{major}{minor}")
    capability, own = torch.backends.cpu.get_cpu_capability(), native.isa()
    if own != capability.lower():
        capability += f", csrc {own}" if own else ", without csrc"
    return Machine(cpu_name(), torch.get_num_threads(), capability)


def versions() -> dict[str, str]:
    """Of what computes."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


@dataclass(frozen=True)
class Code:
    """A revision, and what was changed in CODE over it: a diff as git writes it, or nothing."""

    revision: str
    changes: str


def git(
    *arguments: str, text: str = "", check: bool = True, index: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs git in this clone, with another index where one is named; UserError where there is no git, or no clone."""
    variables = dict(os.environ) | ({"GIT_INDEX_FILE": str(index)} if index else {})
    try:  # bytes, as a text's line ends would be translated
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, input=text.encode("utf-8", "surrogateescape"), capture_output=True,
            env=variables,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"git can't be run ({error.strerror}): a record says of which revision it is") from None
    out, said = (one.decode("utf-8", "surrogateescape") for one in (done.stdout, done.stderr))
    if check and done.returncode:
        raise UserError(f"git {arguments[0]}, in {ROOT}: {shown((said.strip().splitlines() or ['it failed'])[-1])}")
    return subprocess.CompletedProcess(done.args, done.returncode, out, said)


def current_code() -> Code:
    """Of this clone. UserError outside of one, and for a file in CODE that git doesn't know: no diff would have it."""
    _need_clone()
    if stray := git("ls-files", "--others", "--exclude-standard", "--", *CODE).stdout.splitlines():
        raise UserError(
            f"{ROOT / stray[0]}: git doesn't know this file, so a record would lack it: git add or remove it"
        )
    return Code(git("rev-parse", "HEAD").stdout.strip(), _changes())


def _need_clone() -> None:
    if not (ROOT / ".git").exists():
        raise UserError(f"{ROOT}: no clone of st_fast's repository, which has the revisions of records; clone it")


def _changes() -> str:
    """Over HEAD, as git apply takes it, whatever a user has configured."""
    flags = ("--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--full-index", "-U3")
    return git("diff", *flags, "--src-prefix=a/", "--dst-prefix=b/", "HEAD", "--", *CODE).stdout


def code_here() -> str:
    """A hash of this process's code; UserError for files of a clone that git doesn't know."""
    if (ROOT / ".git").exists():
        return state(current_code())
    sources = sorted(path for one in CODE for path in (ROOT / one).rglob("*") if path.suffix in SOURCES)
    return sha256(b"".join(sha256(path.read_bytes()).digest() for path in sources)).hexdigest()


def state(code: Code) -> str:
    """A hash of the code itself: revisions that differ in documents have the same."""
    trees = [git("rev-parse", "-q", "--verify", f"{code.revision}:{one}", check=False).stdout for one in CODE]
    return sha256(f"{trees}{code.changes}".encode("utf-8", "surrogateescape")).hexdigest()


def unread(code: Code) -> list[str]:
    """The files of `code` that are not as this clone's history has them: by its changes, or by a branch that it is of.

    Of the whole repository, as a file at its top may be imported, too. UserError where the changes don't apply, and for
    links, behind which other files would be.
    """
    base = code.revision
    if git("merge-base", "--is-ancestor", code.revision, "HEAD", check=False).returncode:
        base = git("merge-base", code.revision, "HEAD", check=False).stdout.strip()
        if not base:
            raise UserError(f"revision {code.revision[:12]}: it has no history in common with this clone's")
    elif not code.changes:
        return []
    with tempfile.TemporaryDirectory(prefix="st_fast-speedrun-") as folder:
        index = Path(folder) / "index"
        git("read-tree", code.revision, index=index)
        if code.changes and git(*APPLY, "--cached", "-", text=code.changes, check=False, index=index).returncode:
            raise UserError(f"changes.diff doesn't apply to revision {code.revision[:12]}")
        raw = git("diff-index", "--cached", "--raw", "--no-renames", "-z", base, index=index).stdout.split("\0")
    found = list(zip(raw[0:-1:2], raw[1::2], strict=True))  # ":old-mode new-mode old-hash new-hash status", path
    if links := [path for said, path in found if said.split()[1] in LINKS]:
        raise UserError(f"{links[0]}: a link, where code has to be files")
    return [path for _, path in found]


def check_scores(where: Path, files: Sequence[str]) -> None:
    """UserError, which begins with the place, where code that scores is among the files that were changed."""
    if scoring := [name for name in files if name.startswith(SCORES)]:
        raise UserError(f"{where}: its code changes {scoring[0]}, which scores; that is no record's to change")


def check_revision(revision: str) -> None:
    """UserError where this clone has no such revision."""
    _need_clone()
    if git("cat-file", "-e", f"{revision}^{{commit}}", check=False).returncode:
        raise UserError(
            f"revision {revision[:12]}: this clone of st_fast has no such commit; git fetch, with --unshallow in a "
            "shallow clone"
        )


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
            apply = ("-C", str(tree), *APPLY, "--index", "-")
            if code.changes and git(*apply, text=code.changes, check=False).returncode:
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
    # Without the second, the working directory would come before the tree, and the clone's own code would run there.
    variables = dict(os.environ) | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"} | numbers
    with subprocess.Popen([sys.executable, "-m", "st_fast", *arguments], env=variables) as process:
        try:
            code = process.wait()
        except BaseException:  # a signal's
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code == EXIT_INTERRUPTED:
        raise Interrupted("the run was interrupted; the same command continues")
    if code:
        raise RunFailed(f"the run ended with exit code {code}; what is wrong stands above")


def check_line(option: str, text: str) -> None:
    """UserError for a text that is more than a cell of a table, or less."""
    if not text.strip() or not text.isprintable() or "|" in text or len(text) > 200:
        raise UserError(f"{option} {shown(text)}: one line of at most 200 characters, without |, is needed")

"""Compares the fused ops of this tree with those of another revision, each in processes of its own, by turns.

The other revision is checked out into a temporary git worktree and measured with this tree's clock. Every revision is
run several times: what two runs of the same code differ by is the noise that a difference has to exceed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = 3
LEAST_NOISE = 0.03


@dataclass(frozen=True)
class Verdict:
    """One op: how much longer it takes than at the base, and by how much that may be chance."""

    key: str
    change: float
    noise: float

    @property
    def slower(self) -> bool:
        return self.change > self.noise

    def __str__(self) -> str:
        word = "slower" if self.slower else "faster" if self.change < -self.noise else "same"
        return f"{self.key}: {100 * self.change:+.1f} % (noise {100 * self.noise:.1f} %), {word}"


def verdicts(ours: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """Judges every op that both have, from several runs of each: the best ones against the runs' own spread."""
    keys = [key for key in ours[0] if all(key in run for run in (*ours, *base))]
    return [_verdict(key, [run[key] for run in ours], [run[key] for run in base]) for key in keys]


def _verdict(key: str, ours: Sequence[float], base: Sequence[float]) -> Verdict:
    spread = max((max(times) - min(times)) / statistics.median(times) for times in (ours, base))
    return Verdict(key, min(ours) / min(base) - 1, max(spread, LEAST_NOISE))


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of `revision` with this tree's bench/ in it, removed at the end. ValueError if git knows no such."""
    with tempfile.TemporaryDirectory(prefix="st_fast-base-") as folder:
        place = Path(folder) / "tree"
        made = subprocess.run(
            ["git", "worktree", "add", "--detach", str(place), revision], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode:
            raise ValueError(f"--base {revision}: {made.stderr.strip().splitlines()[-1]}")
        try:
            shutil.rmtree(place / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", place / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], cwd=ROOT, check=True)


def times(tree: Path) -> dict[str, float]:
    """Runs `bench.ops` in a tree; RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "-m", "bench.ops", "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": ""}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench.ops in {tree}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(out.read_text())


def compare(revision: str) -> list[Verdict]:
    """Measures both by turns, RUNS times each, and as often again before it calls anything slower."""
    ours: list[dict[str, float]] = []
    base: list[dict[str, float]] = []
    with worktree(revision) as tree:
        for _ in range(2):
            for _ in range(RUNS):
                base.append(times(tree))
                ours.append(times(ROOT))
            found = verdicts(ours, base)
            if not any(verdict.slower for verdict in found):
                break
    return found


def report(revision: str) -> int:
    """Prints every op's verdict; 1 if any is slower, 2 if one of the revisions can't be measured."""
    try:
        found = compare(revision)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, found)))
    return int(any(verdict.slower for verdict in found))

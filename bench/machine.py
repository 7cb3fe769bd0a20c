"""The machine that figures hold for, what else it does meanwhile, and where rows are kept: one JSON file a device."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measure import Effort, Row, copy_rate
from st_fast.core.machine import cpu_name
from st_fast.kernels import native
from st_fast.kernels.build import locked
from st_fast.train import log

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
SOURCES = ("st_fast", "kernels", "csrc", "bench", "recipes")
BUSY = 0.25
"""Share of all processors' time that other work took, above which figures are marked as a busy machine's."""
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def notices(said: list[str]) -> Row:
    """For a row while which something was given up, a kernel, a compiler, a backend: it is no result."""
    return {"ok": False, "notices": said} if said else {}


def left_out(refusal: str) -> Callable[[], Row]:
    """The task of a row that can't be had here."""
    return lambda: {"ok": True, "left_out": refusal}


@dataclass(frozen=True)
class Machine:
    """What the figures hold for."""

    device: str
    kind: str
    threads: int
    load: float
    """Other work on the machine when measuring began: the share of all processors' time it took."""
    copy_rate: float
    """Bytes a second, read and written."""
    matmul_rate: float
    """FLOP a second at `matmul_dtype`."""
    matmul_dtype: str
    versions: dict[str, str]
    isa: str | None
    commit: str
    code: str
    """Digest of the sources: what was measured, also where git is not there."""
    date: str

    @property
    def busy(self) -> bool:
        return self.load > BUSY

    @property
    def slug(self) -> str:
        """The results file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")


def device_kind() -> str:
    """The kind of device that is there, asked without taking any of its memory."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_device() -> torch.device:
    """The current device of that kind by its number, as tensors name it."""
    return torch.device("cuda", torch.cuda.current_device()) if device_kind() == "cuda" else torch.device("cpu")


def end_with_the_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, as where a whole call is killed for its time.

    A process that it starts has to ask for itself: `preexec_fn` of `subprocess`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {cpu_name()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The short revision, with a + where the sources differ from it; "unknown" outside of git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", *SOURCES, ":!bench/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_digest() -> str:
    """Of everything that is measured or measures: it changes with any of these files."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".toml"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class OthersLoad:
    """The share of all processors' time that other processes take from the making of this on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all processors, in use and passed, and of this process and its ended children."""
        try:
            fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
            user, nice, system, idle, waiting, *interrupts = map(int, fields)
        except (OSError, ValueError):  # not there, or another system's
            return 0.0, 0.0, 0.0
        used, tick = user + nice + system + sum(interrupts), os.sysconf("SC_CLK_TCK")
        return used / tick, (used + idle + waiting) / tick, sum(os.times()[:4])

    def read(self, otherwise: float | None = None) -> float:
        """Since then; `otherwise`, or last minute's average, where no time has passed or the system does not count."""
        used, passed, own = (after - before for before, after in zip(self._start, self._now(), strict=True))
        if passed < 0.2:
            return os.getloadavg()[0] / (os.cpu_count() or 1) if otherwise is None else otherwise
        return min(max((used - own) / passed, 0.0), 1.0)


def measure_machine(device: torch.device, small: bool = False) -> Machine:
    """Takes others' load, then the device's copy and matmul rates: a few seconds; `small`: one copy, to see it work."""
    from triton import __version__ as triton

    others = OthersLoad()
    time.sleep(1.0)
    load = others.read()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Machine(
        device=device_name(device),
        kind=device.type,
        threads=torch.get_num_threads(),
        load=round(load, 2),
        copy_rate=copy_rate(device, Effort(rounds=1, least=1, warmup=0) if small else None),
        matmul_rate=log.matmul_rate(device, dtype),
        matmul_dtype=str(dtype).removeprefix("torch."),
        versions={"python": platform.python_version(), "torch": torch.__version__, "triton": triton},
        isa=native.isa(),
        commit=_commit(),
        code=code_digest(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


class Store:
    """Writes rows as they come, so that a run that is cut short leaves what it measured."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.machine, self.path = machine, folder / f"{machine.slug}.json"

    def put(self, part: str, key: str, row: Row) -> None:
        """Replaces the row `key` of a part and the part's machine. Processes may do so at once.

        A row that does not say at what load it was measured gets this call's: rows of a part may come from several.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent):
            content = self._content()
            section = content.setdefault(part, {"machine": {}, "rows": {}})
            section["machine"] = asdict(self.machine)
            section["rows"][key] = {"load": self.machine.load} | row
            aside = self.path.with_suffix(f".{os.getpid()}.partial")
            try:
                aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                os.replace(aside, self.path)
            except OSError:
                aside.unlink(missing_ok=True)
                raise

    def rows(self, part: str) -> dict[str, Row]:
        """What a part holds so far, of this device."""
        return self._content().get(part, {}).get("rows", {})

    def _content(self) -> dict[str, Any]:
        content = load(self.path)
        if not isinstance(content, dict) or not all(map(_is_part, content.values())):
            raise Damaged(f"{self.path}: not a file of results; move it away, and its rows are measured again")
        return content


def files(folder: Path) -> list[Path]:
    """The folder's results files; it may hold other JSON."""
    return [path for path in sorted(folder.glob("*.json")) if _holds_parts(path)]


def _holds_parts(path: Path) -> bool:
    try:
        content = load(path)
    except Damaged as error:
        print(error, file=sys.stderr)
        return False
    return bool(content) and isinstance(content, dict) and all(map(_is_part, content.values()))


def _is_part(section: Any) -> bool:
    return isinstance(section, dict) and section.keys() >= {"machine", "rows"}


@dataclass(frozen=True)
class Suite:
    """What all parts of a call share: the device, the sizes, where rows go, and until when."""

    device: torch.device
    store: Store
    small: bool = False
    """Sizes that a CPU does in minutes: a rehearsal."""
    full: bool = False
    """More sizes and rivals."""
    until: float = float("inf")
    """By time.monotonic(): when the time is spent. A task that can stop by itself, with all saved, does so before."""
    runs: Path = ROOT / "runs" / "gpu_day"
    """Where the study's runs lie."""
    only: tuple[str, ...] = ()
    """The names of the rows to measure contain one of these; none: all are measured."""
    again: bool = False
    """Rows that failed, or that were measured while others kept the machine busy, are measured once more."""
    keep: bool = False
    """Rows that other sources measured count."""
    found: set[str] = field(default_factory=set)
    """Those of `only` that some row's name has contained so far."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        """Of training there."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def effort(self) -> Effort:
        """Of a comparison."""
        if self.small:
            return Effort(rounds=3, seconds=1, least=2, warmup=1)
        return Effort(rounds=20, seconds=1.5, least=5) if self.device.type == "cuda" else Effort(100, 2.5)

    def names(self, key: str) -> bool:
        """Whether a row of this name is to be measured."""
        here = [part for part in self.only if part in key]
        self.found.update(here)
        return not self.only or bool(here)

    def wants(self, row: Row) -> bool:
        """Whether a row has still to be measured: by this code, to its end, or once more."""
        measured = bool(row) and (self.keep or row.get("code") == self.store.machine.code)
        poor = not row.get("ok", True) or row.get("load", 0.0) > BUSY
        return not measured or bool(row.get("unfinished")) or (self.again and poor)


Task = tuple[str, Callable[[], Row]]
"""A row's name and what measures it."""


class Damaged(ValueError):
    """A results file that can't be read, in one line."""


def load(path: Path) -> dict[str, Any]:
    """A results file's content by part; empty where there is none. Raises Damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: can't be read ({error}); move it away, and its rows are measured again") from None

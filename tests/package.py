"""Builds sdist and wheel, installs the wheel into an empty environment, and runs its demo, shortened, from no checkout.

    python -m tests.package build/package

`make package`, which CI runs, too. Says how long each part took; ends with 1 where one failed.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = (
    "--stage.align.steps=20", "--stage.transcend.steps=20", "--sample.num=10", "--sample.steps=5",
    "--evaluate.classifier=false", "--run.log_every=10",
)  # fmt: skip
WANTED = (
    "st_fast/recipes/digits.toml", "st_fast/csrc/cpu/kernels.h", "st_fast/report/page.html",
    "st_fast/kernels/adaln/triton.py", "st_fast/study/speedrun/tasks/digits/task.toml",
)  # fmt: skip
"""What a wheel has beside its modules, one of each kind."""


def timed(what: str, command: Sequence[object], folder: Path) -> str:
    """Runs a command in a folder and says how long it took; its output."""
    start, clean = time.perf_counter(), {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=clean, capture_output=True, text=True)
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{what} failed with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def main(folder: Path) -> None:
    """All of it, in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    made, empty, place = folder / "dist", folder / "environment", folder / "elsewhere"
    place.mkdir(parents=True)
    timed("sdist, and the wheel from it", [sys.executable, "-m", "build", "-o", made, ROOT], place)
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    there = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True)
    if lacking := [name for name in WANTED if name not in there.stdout]:
        sys.exit(f"{wheel.name} lacks {', '.join(lacking)}")
    timed("an empty environment", [sys.executable, "-m", "venv", empty], place)
    python = empty / "bin" / "python"
    timed("pip", [python, "-m", "pip", "install", "-q", "--upgrade", "pip"], place)
    wanted = ["-q", "-c", ROOT / "constraints.txt", wheel]
    timed("download", [python, "-m", "pip", "download", "-d", folder / "wheels", *wanted], place)
    install = [python, "-m", "pip", "install", "--find-links", folder / "wheels", *wanted]
    timed("install, apart from downloads", install, place)
    program = "import st_fast.kernels.reference, st_fast.model"
    told = timed("first import, which compiles csrc", [python, "-c", program], place)
    said = timed("st-fast demo, shortened", [empty / "bin" / "st-fast", "demo", *SHORT], place)
    if "compiling csrc" not in told + said or "usually" not in told + said:
        sys.exit("nothing was said of how long csrc takes to compile")
    if not (place / "runs" / "digits" / "report.html").is_file():
        sys.exit(f"no report:\n{said[-2000:]}")
    print(f"{sdist.name}, {wheel.name}: the demo wrote its report", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""From starting Python to the end of the first step, with an empty and with a filled compile cache.

    python -m bench.first_step --size S/2 --stage plain --batch 8     one start, its parts as a line of JSON

`cold_and_warm` runs that twice in new processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.workload import Setup  # importing it is part of what is timed

ROOT = Path(__file__).resolve().parent.parent


def cold_and_warm(setup: Setup) -> dict[str, dict[str, float]]:
    """Seconds of a start without and with the compiler's cache. RuntimeError with the last line if it fails."""
    with tempfile.TemporaryDirectory(prefix="st_fast-cache-") as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        return {name: _start(setup, environment) for name in ("cold", "warm")}


def _start(setup: Setup, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.first_step", "--size", setup.size, "--stage", setup.stage]
    command += ["--batch", str(setup.batch), "--device", str(setup.device), "--", *setup.options]
    start = time.perf_counter()
    from bench.day import end_with_the_one_who_started_this  # not at the top: importing torch is part of what is timed

    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=end_with_the_one_who_started_this
    )
    if done.returncode:
        raise RuntimeError(f"bench.first_step: {done.stderr.strip().splitlines()[-1]}")
    parts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"total": time.perf_counter() - start, **parts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--device", required=True, help="such as cpu or cuda:0")
    parser.add_argument("options", nargs="*", help="over the recipe, such as --optim.micro_batch=auto, after a --")
    settings = parser.parse_args()
    start = time.perf_counter()
    import torch

    from bench.workload import Setup, ours

    imported = time.perf_counter()
    device = torch.device(settings.device)
    with ours(Setup(settings.size, settings.stage, settings.batch, device, options=tuple(settings.options))) as loop:
        built, ends = time.perf_counter(), []
        for _ in range(2):
            loop()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(time.perf_counter())
    parts = {"import": imported - start, "build": built - imported}
    print(json.dumps(parts | {"first_step": ends[0] - built, "second_step": ends[1] - ends[0]}))


if __name__ == "__main__":
    main()

"""`python -m st_fast probe MODEL`: measures the features of a model's blocks, in figures and numbers.

examples:
  python -m st_fast probe runs/digits
      every stage of one run → runs/digits/probe/*.png and probe.json
  python -m st_fast probe runs/digits runs/plain
      and another run's stages beside them, also into runs/digits/probe
  python -m st_fast probe runs/plain runs/stage1 runs/stage2 --write docs/probes.md
      a page: does the method do what its paper claims? One row a claim, three figures in docs/probes
  python -m st_fast probe SiT-XL-2-256x256.pt --data data/imagenet
      another project's model on a data folder's latents → probe/SiT-XL-2-256x256

There go a linear probe's accuracy by block and time, PCA pictures of the patches, the alignment (CKA) between blocks
and with the teacher's, and the held-out denoising loss by time; and of a stage 2 how discriminative and how clean its
teacher's guided features are, by ω and time, in probe.json. `st_fast.report` shows the figures of runs.
"""

import argparse
import time
from collections.abc import Sequence

from st_fast.core.command import command_parser, need_each_once, need_model, run_command
from st_fast.core.options import ARCHITECTURE_MOST, COUNT_MOST, add_file_options, integer, number, path
from st_fast.core.signals import catch_signals

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
BINS = 10


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("probe", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="MODEL",
        help="runs, or what else st_fast.sample takes; the first gets the figures",
    )  # fmt: skip
    parser.add_argument("--data", type=path, metavar="FOLDER", help="whose latents, for models that come without any")
    add_file_options(parser)
    parser.add_argument("--out", type=path, help="where the figures go (default: RUN/probe, or probe/MODEL)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument(
        "--images", type=integer(1, COUNT_MOST), default=800, help="training images of the linear probe (800)"
    )
    parser.add_argument(
        "--times", type=number(0, 1), nargs="+", default=list(TIMES), help="noise levels, 0 data to 1 noise"
    )
    parser.add_argument(
        "--block", type=integer(1, ARCHITECTURE_MOST["depth"]), metavar="N",
        help="measure guided features of every model named at this block (default: of stage 2's teachers, at theirs)",
    )  # fmt: skip
    parser.add_argument("--write", type=path, metavar="PAGE", help="also write what was found, as Markdown")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Probes every trained stage of the runs named; UserError for what is missing or can't be compared."""
    given = parser().parse_intermixed_args(arguments)
    for run in given.runs:
        need_model(run)
    need_each_once(given.runs)
    from st_fast.evaluate.probe.together import probe  # torch is imported only once the arguments are right

    start = time.perf_counter()
    written = probe(given, sorted(set(given.times)), BINS)
    print(f"{written} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    catch_signals()
    run_command(main)

"""Run by test_dcp.py on every rank: a checkpoint to DCP or back; prints the peak of host memory beside the share."""

import json
import resource
import sys
import tempfile
from pathlib import Path

import torch

from st_fast.core.checkpoint.dcp import read_dcp, write_dcp
from st_fast.core.checkpoint.store import save
from st_fast.core.ranks import process_group


def peak() -> int:
    """Bytes of the most host memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(way: str, source: Path, target: Path) -> None:
    torch.set_num_threads(1)
    with process_group("cpu", patience=60) as ranks:
        # What is imported on first use is no part of a checkpoint.
        warm = Path(ranks.broadcast_from_rank0(tempfile.mkdtemp))
        if ranks.first:
            save(warm, 1, {"model": {"a": torch.zeros(8, 2), "b": torch.tensor(1.0)}}, {})
        ranks.barrier()
        write_dcp(warm / "00000001", warm / "dcp", ranks)
        ranks.barrier()
        read_dcp(warm / "dcp", warm / "back", ranks)
        before = peak()
        if way == "write":
            write_dcp(source, target, ranks)
        else:
            read_dcp(source, target, ranks)
        print(json.dumps({"rank": ranks.rank, "more": peak() - before}), flush=True)
        ranks.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

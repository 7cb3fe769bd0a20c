"""What torch.compile leaves of a graph: which of its operations become one kernel, and what that reads and writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from st_fast.train.profiling import family

Bytes = dict[int, float]
"""By storage: views of one count once."""


@dataclass(frozen=True)
class Kernel:
    """The work of one op, or of several that are fused."""

    name: str
    """As a profiler would show it: `st_fast.train.profiling` sorts by it."""
    phase: str
    """The range of the step that it belongs to (`st_fast.train.profiling`, or "heads")."""
    bytes: float
    """Read and written."""
    flops: float = 0.0
    low: bool = True
    """Multiplies in 16 bits, else in float32."""
    launches: int = 1

    @property
    def family(self) -> str:
        """Its family as `st_fast.train.profiling` has it."""
        found = family(self.name)
        return "matrix products" if self.flops and found != "attention" else found


@dataclass(frozen=True)
class Op:
    """One operation as it was dispatched."""

    kernel: Kernel
    reads: Bytes
    writes: Bytes
    reduces: str
    """"rows": over the last axis alone; "columns": over others; "": nothing."""

    @property
    def alone(self) -> bool:
        """Whether nothing is fused with it: products, attention, ops of ours; sums over columns start anew."""
        return bool(self.kernel.flops) or self.kernel.name.startswith("st_fast::") or self.reduces == "columns"


def fused(ops: Sequence[Op], needed: set[int]) -> list[Kernel]:
    """The kernels of a compiled graph, of which the storages `needed` are results.

    Elementwise ops and reductions over rows that hand values to one another, with nothing between them that runs alone,
    are one kernel: it reads what it does not make and writes what others need. A sum over columns is a kernel of its
    own, which computes again what only it needs; sums that share an input are one. Inductor does the same, but for its
    limits on size, and copies that its layouts take.
    """
    made = {storage: number for number, op in enumerate(ops) for storage in op.writes}
    levels = _levels(ops, made, needed)
    groups = list(range(len(ops)))

    def join(a: int, b: int) -> None:
        old, new = groups[a], groups[b]
        groups[:] = [new if g == old else g for g in groups]

    for number, op in enumerate(ops):
        for storage in op.reads:
            maker = made.get(storage, number)
            if not op.alone and not ops[maker].alone and levels[maker] == levels[number]:
                join(number, maker)
    stored = set(needed)
    for number, op in enumerate(ops):
        for storage in op.reads:
            maker = made.get(storage, number)
            again = op.reduces == "columns" and not ops[maker].alone and not ops[maker].reduces
            if groups[maker] != groups[number] and not again:
                stored.add(storage)
    reads = [_computed_again(op, ops, made, stored) if op.reduces == "columns" else op.reads for op in ops]
    first: dict[tuple[int, int], int] = {}
    for number, op in enumerate(ops):
        for storage in reads[number] if op.reduces == "columns" else ():
            join(number, first.setdefault((storage, levels[number]), number))
    members = defaultdict(list)
    for number in range(len(ops)):
        members[groups[number]].append(number)
    return [kernel for group in members.values() if (kernel := _kernel(ops, group, reads, stored)) is not None]


def _levels(ops: Sequence[Op], made: dict[int, int], needed: set[int]) -> list[int]:
    """How many ops that run alone must come before each; what is not a result waits until it is asked for."""
    levels: list[int] = []
    for number, op in enumerate(ops):
        makers = [made[storage] for storage in op.reads if made.get(storage, number) < number]
        levels.append(max((levels[maker] + ops[maker].alone for maker in makers), default=0))
    wanted = [len(ops)] * len(ops)
    for number in reversed(range(len(ops))):
        op = ops[number]
        if wanted[number] < len(ops) and not op.alone and not needed & op.writes.keys():
            levels[number] = max(levels[number], wanted[number])
        for storage in op.reads:
            maker = made.get(storage, number)
            wanted[maker] = min(wanted[maker], levels[number])
    return levels


def _computed_again(op: Op, ops: Sequence[Op], made: dict[int, int], stored: set[int]) -> Bytes:
    """What an op reads if it makes for itself what nobody stores."""
    found: Bytes = {}
    for storage, size in op.reads.items():
        if storage in stored or storage not in made:
            found[storage] = max(size, found.get(storage, 0.0))
        else:
            found |= _computed_again(ops[made[storage]], ops, made, stored)
    return found


def _kernel(ops: Sequence[Op], group: Sequence[int], reads: Sequence[Bytes], stored: set[int]) -> Kernel | None:
    """One kernel of the ops of a group; None where all of it is computed again elsewhere."""
    if len(group) == 1 and ops[group[0]].alone and not ops[group[0]].reduces:
        return ops[group[0]].kernel
    inside = {storage for number in group for storage in ops[number].writes}
    read: Bytes = {}
    for number in group:
        read |= {s: max(size, read.get(s, 0.0)) for s, size in reads[number].items() if s not in inside}
    written = {s: size for number in group for s, size in ops[number].writes.items() if s in stored}
    if not written:
        return None
    reduces = any(ops[number].reduces for number in group)
    names = dict.fromkeys(ops[number].kernel.name.split("::")[1].strip("_") for number in group)
    name = f"triton_{'red' if reduces else 'poi'}_fused_{'_'.join(names)}"
    return Kernel(name, ops[group[0]].kernel.phase, sum(read.values()) + sum(written.values()))

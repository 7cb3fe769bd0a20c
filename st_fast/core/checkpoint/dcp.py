"""A checkpoint of ours ↔ a folder of PyTorch's Distributed Checkpoint (DCP), with any number of ranks on both sides.

Names are torchtitan's: the raw weights by their own names at the top, AdamW's running means and step as
`optimizer.state.<weight>.exp_avg` and so on, `train_state.step`. What torchtitan does not have is under `st_fast.`:
the averages, the heads, and the metadata as JSON bytes, so that the way back gives the same bits. Each rank reads,
holds and writes its rows of every tensor and no more. No pickle is executed: of DCP's own, `.metadata`, only the
classes of its index are made.
"""

import importlib
import json
import math
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from st_fast.core.checkpoint.groups import BY_ROWS, DTYPE_NAMES, DTYPES, REPLICATE, bytes_of, fields
from st_fast.core.checkpoint.store import Manifest, check_names, digest_of, read_manifest, save
from st_fast.core.checkpoint.together import Team
from st_fast.core.errors import RunFailed, UserError, first_line
from st_fast.core.files import BadFile, inside, is_count, json_bytes, shown, write_folder
from st_fast.core.ranks import Ranks, Rendezvous, rows

INDEX = ".metadata"
"""The file that makes a folder DCP's."""
META = "st_fast.meta"
STEP = "train_state.step"
T = TypeVar("T")
_INDEX_OF = "torch.distributed.checkpoint."
_KNOWN = {
    (_INDEX_OF + "metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    (_INDEX_OF + "filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("collections", "OrderedDict"),
} | {("torch", str(dtype).removeprefix("torch.")) for dtype in DTYPE_NAMES}  # fmt: skip
"""What the index of a DCP folder is made of."""


def is_dcp(path: Path) -> bool:
    """Whether a folder is DCP's."""
    return (path / INDEX).is_file()


def name_in_dcp(group: str, key: str) -> str:
    """What a checkpoint's tensor is called in DCP."""
    if group == "model":
        return key
    if group == "optim":
        module, _, rest = key.partition(".")
        kind, _, weight = rest.partition(".")
        if weight:  # a running mean
            return f"optimizer.state.{weight if module == 'model' else f'st_fast.{module}.{weight}'}.{kind}"
    return f"st_fast.{group}.{key}"


def write_dcp(source: Path, target: Path, ranks: Ranks) -> None:
    """Writes the checkpoint folder `source` as the DCP folder `target`, whole or not at all; all ranks call it alike.

    BadFile where the checkpoint is not as its manifest says, RunFailed where the target can't be written.
    """
    dcp = _dcp()

    manifest: Manifest = ranks.broadcast_from_rank0(lambda: _verified(source))
    state: dict[str, Tensor] = {}
    listed, mine = list[dict[str, Any]](), list[Tensor]()
    for group, record in manifest.groups.items():
        read = record.read_rows(source, lambda _, shape: rows(shape[0], ranks.rank, ranks.count) if shape else None)
        for key, tensor in read.items():
            name, shape = name_in_dcp(group, key), list(record.tensors[key]["shape"])
            state[name] = _share(tensor, shape, ranks)
            mine.append(tensor)
            listed.append(
                {"name": name, "group": group, "key": key, "shape": shape, "dtype": DTYPE_NAMES[tensor.dtype]}
            )
    for one, number in zip(listed, _sums(mine, [one["shape"] for one in listed], ranks), strict=True):
        one["sum"] = number
    for key, tensor in _steps(manifest, state).items():
        state[key] = tensor
    content = {"meta": dict(manifest.meta), "step": manifest.step, "tensors": listed}
    text = json_bytes(content | {"digest": digest_of(content)})
    state[META] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    state[STEP] = torch.tensor(manifest.step)
    with _aside(target, ranks) as folder:
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=ranks.count == 1)
        except (Exception, _failed_somewhere()) as error:
            raise RunFailed(f"{target}: can't be written ({_reason(error)})") from error


def _verified(source: Path) -> Manifest:
    manifest = read_manifest(source)
    for group in manifest.groups.values():
        group.check(source, deep=True)
    return manifest


def _steps(manifest: Manifest, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's count of updates of each weight, as PyTorch's optimisers keep it."""
    found = {}
    for name in state:
        if name.startswith("optimizer.state.") and name.endswith(".exp_avg"):
            module = "heads" if name.startswith("optimizer.state.st_fast.heads.") else "model"
            count = state.get(f"st_fast.optim.{module}.step")
            if count is not None:
                found[name.removesuffix("exp_avg") + "step"] = count
    return found


def _sums(mine: Sequence[Tensor], shapes: Sequence[list[int]], ranks: Ranks) -> list[int]:
    """A number for each tensor that changes with any of its bits, the same for any number of ranks that share its rows.

    The sum over rows of their CRC-32, each of which begins with the row's number.
    """
    found = []
    for tensor, shape in zip(mine, shapes, strict=True):
        data = bytes_of(tensor.contiguous())
        if not shape:
            found.append(zlib.crc32(data) if ranks.first else 0)
            continue
        first, width = rows(shape[0], ranks.rank, ranks.count)[0], len(data) // max(len(tensor), 1)
        parts = (zlib.crc32(data[at * width : (at + 1) * width], first + at) for at in range(len(tensor)))
        found.append(sum(parts))
    return [int(number) for number in ranks.sum(torch.tensor(found, dtype=torch.int64)).tolist()]


def _share(mine: Tensor, shape: list[int], ranks: Ranks) -> Tensor:
    """This rank's rows as a part of the whole tensor."""
    if ranks.count == 1 or not shape:
        return mine
    from torch.distributed.tensor import DTensor, Shard

    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        mine, _mesh(ranks.count), [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )  # fmt: skip


@cache
def _mesh(count: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (count,))


def read_dcp(source: Path, root: Path, ranks: Ranks) -> Path:
    """Reads the DCP folder `source`, which `write_dcp` made, into `root/<step:08d>`; all ranks call it alike.

    With several ranks each writes its part of a sharded checkpoint. UserError where it is another program's, BadFile
    where it is damaged.
    """
    described_there = ranks.broadcast_from_rank0(lambda: _tensors(source))
    if META not in described_there:
        raise UserError(
            f"{source}: a DCP folder that st_fast has not written: nothing tells what its {len(described_there)} "
            "tensors are; python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes a "
            "file of it that convert reads (it unpickles: only of a folder that you trust)"
        )
    step, listed, meta = _read_meta(source, described_there)
    state, groups, mine = dict[str, Tensor](), dict[str, dict[str, Tensor]](), list[Tensor]()
    for one in listed:
        local = torch.zeros(_rows_of(one["shape"], ranks), dtype=DTYPES[one["dtype"]])
        groups.setdefault(one["group"], {})[one["key"]] = local
        state[one["name"]] = _share(local, one["shape"], ranks)
        mine.append(local)
    _load(source, state, ranks.count == 1)
    sums = _sums(mine, [one["shape"] for one in listed], ranks)
    if wrong := [one["name"] for one, number in zip(listed, sums, strict=True) if number != one["sum"]]:
        raise BadFile(f"{source}: {len(wrong)} tensors are not as they were written, the first is {shown(wrong[0])}")
    if ranks.count == 1:
        return save(root, step, groups, meta)
    assert ranks.attempt is not None
    team = Team(ranks.rank, ranks.count, Rendezvous(ranks.attempt, "dcp"), root.name, lambda: False)
    whole: dict[str, dict[str, dict[str, object]]] = {group: {} for group in groups}
    for one in listed:
        placement = BY_ROWS if one["shape"] else REPLICATE
        whole[one["group"]][one["key"]] = {"shape": one["shape"], "dtype": one["dtype"], "placement": placement}
    parts = {g: {k: t for k, t in ts.items() if t.ndim or ranks.first} for g, ts in groups.items()}
    saved = team.save(root, step, parts, whole, meta)
    if saved is None:
        raise RunFailed(f"{root}: another rank could not write its part")
    return saved


def _rows_of(shape: list[int], ranks: Ranks) -> list[int]:
    if not shape:
        return []
    start, stop = rows(shape[0], ranks.rank, ranks.count)
    return [stop - start, *shape[1:]]


def _tensors(source: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of each tensor in a DCP folder; what is no tensor is left out."""
    kind = importlib.import_module("torch.distributed.checkpoint.metadata").TensorStorageMetadata
    index = _told(source, lambda: _reader(source).read_metadata())
    found = {}
    for name, one in index.state_dict_metadata.items():
        if type(one) is kind and one.properties.dtype in DTYPE_NAMES and all(map(is_count, one.size)):
            found[str(name)] = list(one.size), one.properties.dtype
    for stored in index.storage_data.values():
        inside(source, str(stored.relative_path))
    there = sum(file.stat().st_size for file in source.iterdir() if file.is_file())
    if (asked := sum(math.prod(shape) * dtype.itemsize for shape, dtype in found.values())) > there:
        raise BadFile(f"{source}: its tensors would have {asked} bytes, its files have {there}")
    return found


LISTED = {"name": str, "group": str, "key": str, "shape": list, "dtype": str, "sum": int}


def _read_meta(
    source: Path, there: Mapping[str, tuple[list[int], torch.dtype]]
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """The step, what `write_dcp` has listed of each tensor, all of which are there, and the checkpoint's metadata."""
    where = f"{source}: {META}"
    raw = {META: torch.zeros(there[META][0], dtype=torch.uint8)}
    _load(source, raw, alone=True)
    try:
        told = json.loads(bytes(raw[META].numpy()))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where} is no JSON ({first_line(error)})") from None
    told = fields(where, told, {"meta": dict, "step": int, "tensors": list, "digest": str})
    if told["digest"] != digest_of(told):
        raise BadFile(f"{where} was changed: its digest is another")
    for number, one in enumerate(told["tensors"]):
        fields(f"{where}: tensor {number}", one, LISTED)
        check = there.get(one["name"])
        if check is None or check != (one["shape"], DTYPES.get(one["dtype"])):
            found = "missing" if check is None else f"{check[1]} {tuple(check[0])}"
            raise BadFile(f"{source}: tensor {shown(one['name'])} is {found}, not as {META} says")
    if told["step"] < 0:
        raise BadFile(f"{where}: step is {told['step']}")
    try:
        check_names([one["group"] for one in told["tensors"]], told["step"])
    except ValueError as error:
        raise BadFile(f"{where}: {first_line(error)}") from None
    return told["step"], told["tensors"], told["meta"]


def _load(source: Path, into: dict[str, Tensor], alone: bool) -> None:
    """Reads tensors, and nothing else: what the index says to be an object would be unpickled."""

    class Planner(_dcp().DefaultLoadPlanner):  # type: ignore[misc]
        def load_bytes(self, read_item: Any, value: Any) -> None:
            raise BadFile(f"{source}: {shown(str(read_item.dest_index.fqn))} is no tensor there")

    def load() -> None:
        _dcp().load(into, storage_reader=_reader(source), planner=Planner(), no_dist=alone)

    _told(source, load)


def _told(source: Path, call: Callable[[], T]) -> T:
    """What DCP's call gives; BadFile in one line for what it raises."""
    try:
        return call()
    except UserError:
        raise
    except (Exception, _failed_somewhere()) as error:
        raise BadFile(f"{source}: can't be read as a DCP folder ({_reason(error)})") from error


def _failed_somewhere() -> type[BaseException]:
    """What DCP wraps an error of any rank in: no Exception."""
    kind: type[BaseException] = importlib.import_module("torch.distributed.checkpoint.api").CheckpointException
    return kind


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where it did."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return f"{type(cause).__name__}: {first_line(cause)}"


def _dcp() -> Any:
    """PyTorch's module, which takes a second to load."""
    return importlib.import_module("torch.distributed.checkpoint")


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise BadFile(f"{INDEX} of a DCP folder asks for {shown(f'{module}.{name}')}, of which no index is made")
        return super().find_class(module, name)


def _reader(source: Path) -> Any:
    """DCP's reader of a folder, whose index is read without executing anything."""

    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(_dcp().FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (source / INDEX).open("rb") as file:
                found = _Index(file).load()
            if getattr(found, "storage_meta", None) is None:
                found.storage_meta = StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(source)


@contextmanager
def _aside(target: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder beside the target for all ranks, which becomes the target at the end; UserError where that exists."""

    def refuse_existing() -> None:
        if os.path.lexists(target):
            raise UserError(f"{target}: exists already; name another folder")

    ranks.broadcast_from_rank0(refuse_existing)
    if not ranks.first:
        yield Path(ranks.broadcast_from_rank0(lambda: ""))
        return
    with write_folder(target) as folder:
        ranks.broadcast_from_rank0(lambda: str(folder))
        yield folder  # DCP's first rank returns when all have written

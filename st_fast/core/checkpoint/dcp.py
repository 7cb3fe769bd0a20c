"""A checkpoint of ours ↔ a folder of PyTorch's Distributed Checkpoint (DCP), with any number of ranks on both sides.

Names are torchtitan's: the raw weights by their own names at the top, AdamW's running means and step as
`optimizer.state.<weight>.exp_avg` and so on, `train_state.step`. What torchtitan does not have is under `st_fast.`:
the averages, the heads, and the metadata as JSON bytes, so that the way back gives the same bits. Each rank reads,
holds and writes its rows of every tensor and no more. No pickle is executed: of DCP's own, `.metadata`, only the
classes of its index are made.
"""

import importlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from st_fast.core.checkpoint.groups import BY_ROWS, DTYPE_NAMES, REPLICATE, described, fields
from st_fast.core.checkpoint.store import Manifest, read_manifest, save
from st_fast.core.checkpoint.together import Team
from st_fast.core.errors import RunFailed, UserError, first_line
from st_fast.core.files import BadFile, inside, json_bytes, shown, write_folder
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
    for group, record in manifest.groups.items():
        mine = record.read_rows(source, lambda _, shape: rows(shape[0], ranks.rank, ranks.count) if shape else None)
        for key, tensor in mine.items():
            state[name_in_dcp(group, key)] = _share(tensor, record.tensors[key]["shape"], ranks)
    for key, tensor in _steps(manifest, state).items():
        state[key] = tensor
    text = json_bytes({"meta": dict(manifest.meta), "step": manifest.step, "groups": list(manifest.groups)})
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
    dcp = _dcp()

    described_there = ranks.broadcast_from_rank0(lambda: _tensors(source))
    if META not in described_there:
        raise UserError(
            f"{source}: a DCP folder that st_fast has not written: nothing tells what its {len(described_there)} "
            "tensors are; python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt makes a "
            "file of it that convert reads"
        )
    step, names, meta = _read_meta(source, described_there)
    state, groups = {}, dict[str, dict[str, Tensor]]()
    for name, (group, key) in names.items():
        shape, dtype = described_there[name]
        local = torch.empty(_rows_of(shape, ranks), dtype=dtype)
        groups.setdefault(group, {})[key] = local
        state[name] = _share(local, shape, ranks)
    _told(source, lambda: dcp.load(state, storage_reader=_reader(source), no_dist=ranks.count == 1))
    if ranks.count == 1:
        return save(root, step, groups, meta)
    assert ranks.attempt is not None
    team = Team(ranks.rank, ranks.count, Rendezvous(ranks.attempt, "dcp"), root.name, lambda: False)
    whole = {
        group: {
            key: described(key, tensor) | {"placement": BY_ROWS if tensor.ndim else REPLICATE}
            | {"shape": described_there[name][0]}
            for name, (of, key) in names.items() if of == group for tensor in (tensors[key],)
        }
        for group, tensors in groups.items()
    }  # fmt: skip
    mine = {g: {k: t for k, t in ts.items() if t.ndim or ranks.first} for g, ts in groups.items()}
    saved = team.save(root, step, mine, whole, meta)
    if saved is None:
        raise RunFailed(f"{root}: another rank could not write its part")
    return saved


def _rows_of(shape: list[int], ranks: Ranks) -> list[int]:
    if not shape:
        return []
    start, stop = rows(shape[0], ranks.rank, ranks.count)
    return [stop - start, *shape[1:]]


def _names(there: Mapping[str, Any], groups: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Group and key of each tensor that a checkpoint of ours with these groups has, by its name in DCP."""
    found = {}
    for name in there:
        if name in (META, STEP):
            continue
        if name.startswith("optimizer.state."):
            weight, _, kind = name.removeprefix("optimizer.state.").rpartition(".")
            module, _, inner = weight.removeprefix("st_fast.").partition(".") if weight.startswith("st_fast.") else (
                "model", "", weight
            )  # fmt: skip
            if kind != "step":
                found[name] = ("optim", f"{module}.{kind}.{inner}")
        elif name.startswith("st_fast."):
            rest = name.removeprefix("st_fast.")  # groups may have dots in their names: ema-0.99
            group = max((g for g in groups if rest.startswith(f"{g}.")), key=len, default=rest.partition(".")[0])
            found[name] = (group, rest.removeprefix(f"{group}."))
        else:
            found[name] = ("model", name)
    return found


def _tensors(source: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of each tensor in a DCP folder; what is no tensor is left out."""
    index = _told(source, lambda: _reader(source).read_metadata())
    found = {}
    for name, one in index.state_dict_metadata.items():
        if hasattr(one, "properties"):
            found[str(name)] = list(one.size), one.properties.dtype
    for stored in index.storage_data.values():
        inside(source, str(stored.relative_path))
    return found


def _read_meta(
    source: Path, there: Mapping[str, tuple[list[int], torch.dtype]]
) -> tuple[int, dict[str, tuple[str, str]], dict[str, Any]]:
    """The step, group and key of each tensor, and the metadata that `write_dcp` has put there."""
    dcp = _dcp()

    raw = {META: torch.empty(there[META][0], dtype=torch.uint8)}
    _told(source, lambda: dcp.load(raw, storage_reader=_reader(source), no_dist=True))
    try:
        told = json.loads(bytes(raw[META].numpy()))
    except ValueError as error:
        raise BadFile(f"{source}: {META} is no JSON ({first_line(error)})") from None
    told = fields(f"{source}: {META}", told, {"meta": dict, "step": int, "groups": list})
    if told["step"] < 0 or not all(isinstance(group, str) for group in told["groups"]):
        raise BadFile(f"{source}: {META} has step {told['step']} and groups {shown(told['groups'])}")
    return told["step"], _names(there, told["groups"]), told["meta"]


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

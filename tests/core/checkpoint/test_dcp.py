"""Checkpoints by way of PyTorch's Distributed Checkpoint: 2 → 4 → 1 ranks, bit by bit, each with its share."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from st_fast.convert.__main__ import main as convert
from st_fast.core.checkpoint import load
from st_fast.core.checkpoint.dcp import name_in_dcp
from st_fast.core.errors import UserError
from tests import warm
from tests.core.checkpoint.sharded import save_sharded

ROWS, WIDTH, TENSORS = 1021, 512, 16
"""A prime number of rows, which no number of ranks divides; 33 MB of weights and as much of every mean."""


def big_state() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model = {f"blocks.{n}.weight": some(ROWS, WIDTH) for n in range(TENSORS)} | {"bias": some(3), "scale": some(1, 1)}
    means = {f"model.{kind}.{key}": some(*t.shape) for kind in ("exp_avg", "exp_avg_sq") for key, t in model.items()}
    heads = {"projectors.0.weight": some(5, 7)}
    means |= {f"heads.{kind}.projectors.0.weight": some(5, 7) for kind in ("exp_avg", "exp_avg_sq")}
    counts = {"model.step": torch.tensor(7.0), "heads.step": torch.tensor(6.0)}
    groups = {"model": model, "ema": {key: some(*t.shape) for key, t in model.items()}, "heads": heads}
    return groups | {"ema-0.99": {"bias": some(3)}, "optim": means | counts}


def ranks(count: int, way: str, source: Path, target: Path) -> list[float]:
    """Runs it on so many ranks; by rank, by how many shares of the state the peak of memory has grown."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if count == 1:
        del shared["WORLD_SIZE"]
    command = ("-m", "tests.core.checkpoint.dcp_child", way, source, target)
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    children = [warm.start(*command, env=shared | place) for place in places]
    said = [child.communicate(240) for child in children]
    assert [child.returncode for child in children] == [0] * count, said
    share = sum(t.nbytes for group in big_state().values() for t in group.values()) / count
    return [json.loads(out.splitlines()[-1])["more"] / share for out, _ in said]


def equal(one, other) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(
        a.keys() == other[group].keys() and all(torch.equal(t, other[group][key]) for key, t in a.items())
        for group, a in one.items()
    )


def test_two_four_and_one_rank_hand_on_the_same_bits_with_no_more_memory_than_their_share(tmp_path) -> None:
    meta = {"stage": "align", "seconds": 1.5}
    (path, _), _ = save_sharded(tmp_path / "two", 7, big_state(), meta, 2)
    grown = {
        "2 write": ranks(2, "write", path, tmp_path / "a"),
        "4 read": ranks(4, "read", tmp_path / "a", tmp_path / "four"),
        "4 write": ranks(4, "write", tmp_path / "four" / "00000007", tmp_path / "b"),
        "1 read": ranks(1, "read", tmp_path / "b", tmp_path / "one"),
    }
    for place in ("four", "one"):
        found = load(tmp_path / place / "00000007")
        assert equal(found.groups, big_state()) and found.meta == meta and found.step == 7
    assert len(list((tmp_path / "four" / "00000007").glob("model.rank-*-of-4.safetensors"))) == 4
    print(grown)
    assert all(share <= 1.2 for shares in grown.values() for share in shares), grown


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A small checkpoint's DCP folder, by the command."""
    folder = tmp_path_factory.mktemp("dcp")
    state = {"model": {"a": torch.randn(6, 4), "b": torch.tensor(2.0)}, "ema": {"a": torch.randn(6, 4)},
             "optim": {"model.exp_avg.a": torch.randn(6, 4), "model.step": torch.tensor(3.0)}}  # fmt: skip
    save_sharded(folder / "stage" / "checkpoints", 3, state, {"stage": "s"}, 1)
    convert([str(folder / "stage"), str(folder / "dcp"), "--to", "dcp"])
    return folder


def test_the_names_are_torchtitans_and_torch_reads_them(written) -> None:
    """As its own loader sees them, which knows nothing of st_fast."""
    names = set(dcp.FileSystemReader(written / "dcp").read_metadata().state_dict_metadata)
    ours = {"st_fast.meta", "st_fast.ema.a", "st_fast.optim.model.step"}
    assert names == {"a", "b", "optimizer.state.a.exp_avg", "optimizer.state.a.step", "train_state.step"} | ours
    state = {"a": torch.zeros(6, 4), "optimizer.state.a.step": torch.tensor(0.0), "train_state.step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=written / "dcp", no_dist=True)
    saved = load(written / "stage" / "checkpoints" / "00000003").groups
    assert torch.equal(state["a"], saved["model"]["a"]) and state["optimizer.state.a.step"] == 3
    assert state["train_state.step"] == 3
    assert name_in_dcp("optim", "heads.exp_avg.x.y") == "optimizer.state.st_fast.heads.x.y.exp_avg"


def test_the_command_goes_there_and_back(written, tmp_path, capsys) -> None:
    convert([str(written / "dcp"), str(tmp_path / "back")])
    assert "written as a checkpoint by 1 rank" in capsys.readouterr().out
    one, other = (load(p / "checkpoints" / "00000003") for p in (written / "stage", tmp_path / "back"))
    assert equal(one.groups, other.groups) and one.meta == other.meta


class Calls:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_hostile_index_runs_nothing(written, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written / "dcp", tmp_path / "dcp")
    for hostile, told in ((pickle.dumps(Calls()), "system"), (b"\x80\x04.", ""), (b"", "")):
        (tmp_path / "dcp" / ".metadata").write_bytes(hostile)
        with pytest.raises(UserError, match=f"(?i)dcp.*{told}") as error:
            convert([str(tmp_path / "dcp"), str(tmp_path / "out")])
        assert "\n" not in str(error.value) and not (tmp_path / "hacked").exists() and not (tmp_path / "out").exists()
    index = dcp.FileSystemReader(written / "dcp").read_metadata()
    for one in index.storage_data.values():
        one.relative_path = "../dcp/__0_0.distcp"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"\.\./dcp"):
        convert([str(tmp_path / "dcp"), str(tmp_path / "out")])


def changed_index(written: Path, folder: Path, change) -> Path:
    """A copy of the DCP folder whose index is another."""
    shutil.copytree(written / "dcp", folder)
    index = dcp.FileSystemReader(written / "dcp").read_metadata()
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_an_object_in_a_tensors_place_is_not_unpickled(written, tmp_path, monkeypatch) -> None:
    """Of allowed classes alone: bytes that look like a tensor, in the index and in the file."""
    monkeypatch.chdir(tmp_path)

    def disguised(name: str):
        def change(index) -> None:
            bare = BytesStorageMetadata()
            bare.properties, bare.size = (
                index.state_dict_metadata[name].properties,
                index.state_dict_metadata[name].size,
            )
            index.state_dict_metadata[name] = bare

        return change

    for name in ("st_fast.meta", "a"):
        folder = changed_index(written, tmp_path / name, disguised(name))
        (data,) = folder.glob("*.distcp")
        payload = pickle.dumps(Calls())
        data.write_bytes(payload + data.read_bytes()[len(payload) :])
        with pytest.raises(UserError) as error:
            convert([str(folder), str(tmp_path / "out")])
        assert "\n" not in str(error.value) and not (tmp_path / "hacked").exists() and not (tmp_path / "out").exists()


def test_what_was_changed_is_found_out(written, tmp_path) -> None:
    """A bit, a chunk that is not there, a tensor that is not there, another shape, the metadata."""
    flipped = tmp_path / "flipped"
    shutil.copytree(written / "dcp", flipped)
    (data,) = flipped.glob("*.distcp")
    saved = load(written / "stage" / "checkpoints" / "00000003").groups["ema"]["a"]
    raw = data.read_bytes()
    at = raw.index(saved.numpy().tobytes()[:32])
    data.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])

    def without_chunks(index) -> None:
        index.state_dict_metadata["a"].chunks = []

    def without(index) -> None:
        del index.state_dict_metadata["optimizer.state.a.exp_avg"]

    def of_another_shape(index) -> None:
        index.state_dict_metadata["a"].size = torch.Size([4, 6])

    for folder, told in (
        (flipped, "1 tensors are not as they were written, the first is 'st_fast.ema.a'"),
        (changed_index(written, tmp_path / "chunks", without_chunks), "'a'|can't be read"),
        (changed_index(written, tmp_path / "lacking", without), "tensor 'optimizer.state.a.exp_avg' is missing"),
        (changed_index(written, tmp_path / "shape", of_another_shape), r"tensor 'a' is torch.float32 \(4, 6\), not"),
    ):
        with pytest.raises(UserError, match=told) as error:
            convert([str(folder), str(tmp_path / "out")])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_told_in_one_line(written, tmp_path) -> None:
    foreign, cut = tmp_path / "foreign", tmp_path / "cut"
    dcp.save({"layer.weight": torch.zeros(2, 2)}, checkpoint_id=foreign, no_dist=True)
    shutil.copytree(written / "dcp", cut)
    (data,) = cut.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:200])
    out = str(tmp_path / "out")
    for arguments, told in (
        ([str(foreign), out], "a DCP folder that st_fast has not written.*dcp_to_torch"),
        ([str(cut), out], "cut: can't be read as a DCP folder"),
        ([str(tmp_path), out, "--to", "dcp"], "no run, stage or checkpoint"),
        ([str(written / "stage"), str(written / "dcp"), "--to", "dcp"], "dcp: exists already; "),
        ([str(written / "dcp"), out, "--to", "huggingface"], "--to huggingface: .* is a DCP folder"),
        ([str(written / "dcp"), out, "--vae", "x"], "--vae"),
    ):
        with pytest.raises(UserError, match=told) as error:
            convert(arguments)
        assert "\n" not in str(error.value) and not Path(out).exists()

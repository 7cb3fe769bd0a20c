"""Models of other projects as somebody might forge them: refused in one line, at no cost in memory or time."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from st_fast.core.errors import UserError
from st_fast.core.files import FREE_BYTES
from st_fast.core.pickled import read_pickled
from st_fast.model.formats import import_file
from tests import foreign


def peak(function: Callable[[], Any]) -> tuple[str, int, float]:
    """What a call is refused with, the resident bytes that it added at most, and its seconds of CPU."""
    done, most = threading.Event(), [0]
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = resident()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident() - before)

    watcher, start = threading.Thread(target=watch), time.process_time()
    watcher.start()
    try:
        with pytest.raises(UserError) as caught:
            function()
    finally:
        done.set()
        watcher.join()
    return str(caught.value), most[0], time.process_time() - start


def weights() -> dict[str, Any]:
    return foreign.repa_weights(foreign.TINY, 1)


def saved(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def packed(path: Path) -> None:
    """Deflated records, a thousand times smaller than what they hold."""
    torch.save({"model": {"x": torch.zeros(1)}}, io_ := io.BytesIO())
    with zipfile.ZipFile(io_) as made, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in made.namelist():
            out.writestr(name, made.read(name) if not name.endswith("/0") else bytes(2**27 + 1))


def claimed(path: Path) -> None:
    """A storage of 2**40 elements of which four bytes are there."""
    torch.save({"model": {"x": torch.zeros(1)}}, io_ := io.BytesIO())
    with zipfile.ZipFile(io_) as made, zipfile.ZipFile(path, "w") as out:
        for name in made.namelist():
            data = made.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"cpuq\x08K\x01t", b"cpuq\x08\x8a\x06" + (2**40).to_bytes(6, "little") + b"t")
                assert b"\x8a\x06" in data
            out.writestr(name, data)


def with_pickle(data: bytes) -> Callable[[Path], None]:
    """A file of torch.save's form around this pickle."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("a/data.pkl", data)

    return write


TANGLED = b")" + b"q\x01h\x01\x86" * 60
"""A tuple of tuples, each twice: 2**60 to hash or to print."""
one = torch.zeros(1)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a block far away": (saved(weights() | {"blocks.50000000.mlp.fc1.bias": one}), "no key of blocks.3"),
    "a block of 5000 digits": (saved(weights() | {f"blocks.{'9' * 5000}.x": one}), "no key of blocks.3"),
    "a block with a minus": (saved(weights() | {"blocks.-1.x": one}), "no key of blocks.3"),
    "20,000 blocks": (saved(weights() | {f"blocks.{n}.x": one for n in range(20_000)}), "blocks, at most"),
    "a view of 2e10": (saved(weights() | {"stranger": one.expand(2 * 10**10)}), "take many times"),
    "a position view": (saved(weights() | {"pos_embed": one.expand(1, 10**8, 32)}), "take many times"),
    "a shared storage": (saved(dict.fromkeys(map(str, range(200)), torch.zeros(2**19))), "take many times"),
    "half precision shared": (saved(dict.fromkeys(map(str, range(99)), torch.zeros(2**19).half())), "take many times"),
    "packed records": (packed, "would unpack|claims"),
    "a claimed storage": (claimed, "are there"),
    "a tangled key": (with_pickle(b"\x80\x02}" + TANGLED + b"K\x01s."), "asks for"),
    "a tangled value": (with_pickle(b"\x80\x02}X\1\0\0\0x" + TANGLED + b"s."), "expected"),
    "a bottomless pickle": (with_pickle(b"\x80\x02" + b"(" * 550_000), "instructions"),
    "a long pickle": (with_pickle(b"\x80\x02]" + b"]a" * 300_000 + b"."), "instructions"),
    "a huge memo": (with_pickle(b"\x80\x02}r\xff\xff\xff\xff."), "expected"),
    "half a surrogate": (with_pickle(b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80K\x01s."), "not a sound"),
    "a number of 2000 bits": (with_pickle(b"\x80\x02}X\x01\0\0\0x\x8a\xfa" + b"\x7f" * 250 + b"s."), "not a sound"),
    "a sparse tensor": (saved(weights() | {"pos_embed": torch.zeros(4, 4).to_sparse()}), "asks for"),
    "a tensor on meta": (saved(weights() | {"pos_embed": torch.zeros(1, device="meta")}), "asks for"),
    "a conjugate view": (saved(weights() | {"x": torch.zeros(2, dtype=torch.complex64)}), "asks for"),
    "a quantised tensor": (saved({"x": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}), "asks for"),
    "a negative stride": (with_pickle(pickle.dumps({"a": 1}, 2).replace(b"K\x01", b"J\xff\xff\xff\xff")), "expected"),
    "no table": (saved([1, 2]), "holds list"),
    "nothing but numbers": (saved({"model": 3}), "expected model or ema"),
    "a table with a list": (saved({"model": {"x": [1]}}), "more than tensors"),
    "a table with numbers as keys": (saved({"model": {3: one}}), "more than tensors"),
    "a table of integers": (saved({k: t.long() for k, t in weights().items()}), "int64"),
    "other labels": (saved(weights() | {"y_embedder.embedding_table.weight": torch.zeros(7, 3)}), "has 7 rows"),
    "positions of no square": (saved(weights() | {"pos_embed": torch.zeros(1, 7, 32)}), "no square"),
    "sizes of zero": (saved(weights() | {"pos_embed": torch.zeros(1, 0, 32)}), "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_before_it_costs_anything(name: str, tmp_path: Path) -> None:
    write, expected = HOSTILE[name]
    write(path := tmp_path / "in.pt")
    message, memory, seconds = peak(lambda: import_file(path, number_of_heads=2, num_classes=5))
    assert "\n" not in message and len(message) < 5_000 and str(path) in message
    assert re.search(expected, message), message
    assert memory < FREE_BYTES and seconds < 10


OPTIMISERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "params of text": lambda opt: opt["param_groups"][0].update(params="abc"),
    "params of lists": lambda opt: opt["param_groups"][0].update(params=[[1]] * 52),
    "two counts in one": lambda opt: opt["state"][3].update(step=torch.zeros(2)),
    "a count of text": lambda opt: opt["state"][3].update(step="7"),
    "a count that is no number": lambda opt: opt["state"][3].update(step=float("nan")),
    "no state for a weight": lambda opt: opt["state"].pop(3),
    "another dtype": lambda opt: opt["state"][3].update(exp_avg=opt["state"][3]["exp_avg"].double()),
    "a group of nothing": lambda opt: opt.update(param_groups=[None]),
    "no groups": lambda opt: opt.pop("param_groups"),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_forged_optimiser_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content = foreign.repa_checkpoint(tmp_path / "in.pt")
    OPTIMISERS[name](content["opt"])
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(UserError, match="opt") as caught:
        import_file(tmp_path / "in.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_read_is_what_torch_reads_from_either_form(zipped: bool, tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    content = {
        "a": shared, "b": shared.t(), "c": shared[1:3, ::2], "none": torch.zeros(0, 3), "p": torch.nn.Parameter(shared),
        "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "bool": torch.tensor([True, False]),
        "state": torch.nn.Linear(2, 3).state_dict(), "args": argparse.Namespace(x=1, y="é", z=(1.5, None, [True])),
        "size": torch.Size([2, 3]), "dtype": torch.float32, "device": torch.device("cpu"), "number": torch.tensor(3.0),
    }  # fmt: skip
    if zipped:  # torch itself can't read those back from the older form
        content["odd"] = torch.randn(3).to(torch.float8_e4m3fn)
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickled(tmp_path / "in.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(tmp_path / "in.pt", weights_only=True)
    assert list(found) == list(expected) and isinstance(found["state"], OrderedDict)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and found[key].stride() == value.stride()
            assert torch.equal(found[key].float(), value.float())
    assert found["args"] == expected["args"] and found["size"] == expected["size"] and found["device"] == "cpu"
    assert all(torch.equal(found["state"][key], value) for key, value in expected["state"].items())
    assert found["a"].data_ptr() == found["b"].data_ptr()  # a storage is read once
    data = (tmp_path / "in.pt").read_bytes()
    for cut in range(0, len(data), len(data) // 40):
        (tmp_path / "in.pt").write_bytes(data[:cut])
        with pytest.raises(UserError):
            read_pickled(tmp_path / "in.pt")


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [
        (10, None, "10 classes, or 9 and a null class"), (10, 10, (10, 0.0)), (10, 9, (9, 0.1)), (1, None, (1, 0.0)),
        (1001, None, (1000, 0.1)), (10, 8, "num_classes = 8, but"), (1, 2, "num_classes = 2, but"),
    ],
)  # fmt: skip
def test_classes_are_counted_right_or_asked_for(rows: int, said: int | None, expected: object, tmp_path: Path) -> None:
    table = foreign.trunk(foreign.TINY, 1) | {"y_embedder.embedding_table.weight": torch.zeros(rows, 32)}
    save_file(table, tmp_path / "in.safetensors")
    read = lambda: import_file(tmp_path / "in.safetensors", "repa", 2, said)  # noqa: E731
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read()
    else:
        assert (read().config.num_classes, read().config.class_dropout) == expected
        assert not read().averaged


def test_one_set_of_weights_is_not_called_two(tmp_path: Path) -> None:
    torch.save(foreign.trunk(foreign.TINY, 1), tmp_path / "in.pt")
    assert not import_file(tmp_path / "in.pt", "sit", 2, 5).averaged
    foreign.repa_checkpoint(tmp_path / "in.pt")
    assert import_file(tmp_path / "in.pt").averaged

"""Models of other projects as somebody might forge them: refused in one line, at no cost in memory or time."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import threading
import time
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from st_fast.core.errors import UserError
from st_fast.core.files import FREE_BYTES
from st_fast.core.torch_files import read_pickled
from st_fast.model.formats import import_file
from st_fast.model.stored import read_weights
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
    "two groups": lambda opt: opt.update(param_groups=opt["param_groups"] * 2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_forged_optimiser_is_left_out_in_one_line_and_the_weights_are_read(name: str, tmp_path: Path) -> None:
    content = foreign.repa_checkpoint(tmp_path / "in.pt")
    OPTIMISERS[name](content["opt"])
    torch.save(content, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt")
    assert found.left_out.startswith("opt ") and "\n" not in found.left_out and str(tmp_path) not in found.left_out
    assert not found.exp_avg and not found.exp_avg_sq and found.updates == 0 and found.step == 3
    assert all(torch.equal(found.model[key], tensor) for key, tensor in content["model"].items())


def numpy_scalar(kind: bytes, data: str, order: str = "<") -> bytes:
    """The pickle of {"x": a NumPy scalar} as protocol 2 has it: of this type, from these bytes."""
    text = data.encode()
    return (
        b"\x80\x02}X\x01\0\0\0xcnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX"
        + len(kind).to_bytes(4, "little") + kind + b"\x89\x88\x87R(K\x03X\x01\0\0\0" + order.encode()
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        + b"c_codecs\nencode\nX" + len(text).to_bytes(4, "little") + text + b"X\x06\0\0\0latin1\x86R\x86Rs."
    )  # fmt: skip


PATH_OF = b"\x80\x02}X\x01\0\0\0xcpathlib\nPosixPath\n("
HOSTILE_VALUES = {
    "objects": (numpy_scalar(b"O8", "12345678"), "asks for numpy dtype O8"),
    "a type of many bytes": (numpy_scalar(b"S1000000000", "1"), "asks for numpy dtype S1000000000"),
    "a long name of a type": (numpy_scalar(b"f8" * 100_000, "1"), "asks for numpy dtype"),
    "a negative size": (numpy_scalar(b"V-1", "1"), "asks for numpy dtype V-1"),
    "fields": (numpy_scalar(b"f8,f8", "1"), "asks for numpy dtype"),
    "too few bytes": (numpy_scalar(b"f8", "1234"), "a number of 4 bytes"),
    "too many bytes": (numpy_scalar(b"f4", "12345678"), "a number of 8 bytes"),
    "a long text as bytes": (numpy_scalar(b"f8", "1" * 100_000), "asks for _codecs encode"),
    "bytes in the other order": (numpy_scalar(b"f8", "12345678", ">"), "asks for numbers in the order"),
    "an array": (
        b"\x80\x02}X\x01\0\0\0xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87Rs.",
        "asks for numpy.core.multiarray _reconstruct",
    ),
    "a path of many parts": (PATH_OF + b"U\x01a" * 400 + b"tRs.", "a path of 400 parts"),
    "a long path": (PATH_OF + b"X\0\x20\0\0" + b"a" * 2**13 + b"tRs.", "a path of 1 parts"),
    "a path of numbers": (PATH_OF + b"K\x01tRs.", "int where str is needed"),
    "a tangled path": (PATH_OF + TANGLED + b"tRs.", "tuple where str is needed"),
    "a tangled device": (b"\x80\x02}X\x01\0\0\0xctorch\ndevice\n" + TANGLED + b"\x85Rs.", "asks for torch device"),
    "a call in place of a class": (b"\x80\x02}X\x01\0\0\0xcos\nsystem\nX\x04\0\0\0true\x85Rs.", "asks for os system"),
    "an instance of a number": (b"\x80\x02}X\x01\0\0\0xK\x01)\x81s.", "asks for an instance of int"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_VALUES)
def test_a_hostile_value_among_the_arguments_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, expected = HOSTILE_VALUES[name]
    with_pickle(data)(path := tmp_path / "in.pt")
    message, memory, seconds = peak(lambda: read_pickled(path))
    assert "\n" not in message and len(message) < 1_000 and "refused, nothing executed" in message
    assert expected in message.replace('"', "").replace("'", "")
    assert memory < FREE_BYTES and seconds < 5


class Config:
    """A class of another project, which holds tensors, too."""

    def __init__(self, **values: object) -> None:
        vars(self).update(values)


class Table(dict):  # type: ignore[type-arg]
    """The same, derived from dict; and from list."""


class Rows(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_what_published_arguments_hold_is_read_as_plain_values(zipped: bool, tmp_path: Path) -> None:
    inner = types.SimpleNamespace(n=1, path=Path("/a") / "b", own=Config(weights=torch.ones(3)))
    args = argparse.Namespace(
        lr=np.float64(1e-4), small=np.float32(0.1), half=np.float16(0.3), steps=np.int64(-7), byte=np.uint8(250),
        yes=np.bool_(True), out=Path("runs/x"), nothing=Path(), inner=inner, counts=defaultdict(dict, a=3),
    )  # fmt: skip
    content = {"x": torch.arange(3), "args": args, "table": Table(a=1), "rows": Rows([1, 2]), "config": Config(a=2)}
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    found = read_pickled(tmp_path / "in.pt")
    assert torch.equal(found["x"], content["x"])
    read = vars(found["args"])
    assert read["lr"] == 1e-4 and read["small"] == float(np.float32(0.1)) and read["half"] == float(np.float16(0.3))
    assert (read["steps"], read["byte"], read["yes"]) == (-7, 250, True) and type(read["yes"]) is bool
    assert (read["out"], read["nothing"], read["counts"]) == ("runs/x", ".", {"a": 3})
    assert (read["inner"].n, read["inner"].path) == (1, "/a/b")
    assert type(read["inner"].own).__name__ == "Unread" and "Config" in read["inner"].own.kind
    assert [type(found[key]).__name__ for key in ("table", "rows", "config")] == ["Unread"] * 3


def test_an_unknown_class_reaches_no_tensors_and_what_it_decides_is_told(tmp_path: Path) -> None:
    content = foreign.repa_checkpoint(tmp_path / "in.pt")
    torch.save({**content, "args": Config(path_type="cosine")}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", "repa", 2, 5)
    assert len(found.remarks) == 1 and found.path == "linear"
    assert re.search("not read, an instance of '.*Config': a linear path and a velocity are assumed", found.remarks[0])
    vars(content["args"]).update(encoder=Config(a=1), layers=Rows([1]))
    torch.save(content, tmp_path / "in.pt")
    assert import_file(tmp_path / "in.pt").remarks == (
        "args without ['encoder', 'layers'], instances of classes that are not read",
    )
    content["args"].path_type = Config()
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"args.path_type is an instance of '.*Config': a plain value is needed"):
        import_file(tmp_path / "in.pt")
    content["args"].path_type = torch.zeros(2, 2)
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"args.path_type is an instance of 'Tensor': a plain value is needed"):
        import_file(tmp_path / "in.pt")
    torch.save({**content, "model": Table(content["model"])}, tmp_path / "in.pt")
    with pytest.raises(UserError, match="a plain value"):  # the model is not read; its average is, whose args are odd
        import_file(tmp_path / "in.pt")
    torch.save({"model": {**content["model"], "pos_embed": Config()}}, tmp_path / "in.pt")
    with pytest.raises(UserError, match=r"holds more than tensors: \['pos_embed'\]"):
        import_file(tmp_path / "in.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_read_is_what_torch_reads_from_either_form(zipped: bool, tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    content = {
        "a": shared, "b": shared.t(), "c": shared[1:3, ::2], "none": torch.zeros(0, 3), "p": torch.nn.Parameter(shared),
        "half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "bool": torch.tensor([True, False]),
        "state": torch.nn.Linear(2, 3).state_dict(), "args": argparse.Namespace(x=1, y="é", z=(1.5, None, [True])),
        "size": torch.Size([2, 3]), "dtype": torch.float32, "device": torch.device("cpu"), "number": torch.tensor(3.0),
        "deep": [({"x": argparse.Namespace(y=torch.randn(4)), "z": torch.randn(3)},)],
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
    (deep,), (ours,) = expected["deep"][0], found["deep"][0]
    assert torch.equal(ours["x"].y, deep["x"].y) and torch.equal(ours["z"], deep["z"])
    assert found["a"].data_ptr() == found["b"].data_ptr()  # a storage is read once
    data = (tmp_path / "in.pt").read_bytes()
    for cut in range(0, len(data), len(data) // 40):
        (tmp_path / "in.pt").write_bytes(data[:cut])
        with pytest.raises(UserError):
            read_pickled(tmp_path / "in.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", ["repa", "sit"])
@pytest.mark.parametrize("only", ["raw", "ema"])
def test_of_two_sets_of_weights_and_an_optimiser_no_more_is_read_than_is_asked_for(
    only: Literal["raw", "ema"], layout: str, zipped: bool, tmp_path: Path
) -> None:
    """The other bytes are damaged: nobody sees it, who does not read them."""
    content = foreign.repa_checkpoint(tmp_path / "in.pt")
    if layout == "sit":
        content |= {name: foreign.trunk(foreign.TINY, seed) for seed, name in enumerate(("model", "ema"))}
        content["opt"] = foreign.adamw_state(content["model"], 3)
    content["loop"] = [content["args"]]
    content["loop"].append(content["loop"])
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    told = layout, 2, foreign.TINY.num_classes
    whole = import_file(tmp_path / "in.pt", *told)
    data = bytearray((tmp_path / "in.pt").read_bytes())
    for name in {"model", "ema", "opt"} - {"model" if only == "raw" else only}:
        table = content[name] if name != "opt" else content["opt"]["state"][5]
        for tensor in table.values():
            if len(found := re.findall(re.escape(tensor.numpy().tobytes()), data)) == 1 and tensor.nbytes > 64:
                at = data.index(found[0])
                data[at : at + tensor.nbytes] = np.full(tensor.numel(), np.nan, np.float32).tobytes()
    (tmp_path / "in.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged" if zipped else "NaN"):
        import_file(tmp_path / "in.pt", *told)
    found = import_file(tmp_path / "in.pt", *told, only=only)
    wanted, other = (found.model, found.ema) if only == "raw" else (found.ema, found.model)
    expected = whole.model if only == "raw" else whole.ema
    assert list(wanted) == list(expected) and all(torch.equal(wanted[key], expected[key]) for key in expected)
    assert all(tensor.is_meta and tensor.shape == expected[key].shape for key, tensor in other.items())
    assert found.averaged and not found.exp_avg and whole.exp_avg and found.config == whole.config
    assert (found.path, found.step, found.facts["args"]) == (whole.path, whole.step, whole.facts["args"])
    if not zipped:
        (tmp_path / "in.pt").write_bytes(data[:-100])
        with pytest.raises(UserError, match=r"cut off|ends at byte"):
            import_file(tmp_path / "in.pt", *told, only=only)


def test_what_stands_in_a_file_once_is_read_whatever_is_asked_for(tmp_path: Path) -> None:
    for name, only in (("ema", "raw"), ("model", "ema"), ("state_dict", "ema")):
        torch.save({name: weights()}, tmp_path / "in.pt")
        found = import_file(tmp_path / "in.pt", "repa", 2, 5, only=only)
        assert not any(tensor.is_meta for tensor in (*found.model.values(), *found.ema.values()))
    shared = weights()
    torch.save({"model": shared, "ema": dict(shared)}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", "repa", 2, 5, only="ema")
    assert all(torch.equal(found.ema[key], shared[key]) for key in shared)


@pytest.mark.parametrize(("ema", "kind"), [([1, 2], "list"), (Config(a=1), ".*Config")])
def test_an_average_that_is_no_table_is_told(
    ema: object, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be drawn from where nothing else is asked for."""
    for only in (None, "raw", "ema"):
        torch.save({"model": weights(), "ema": ema}, tmp_path / "in.pt")
        (told,) = import_file(tmp_path / "in.pt", "repa", 2, 5, only=only).remarks
        assert re.fullmatch(f"ema is no table but '{kind}', and is not read: the raw weights stand for it", told)
    read_weights(tmp_path / "in.pt", foreign.TINY, "ema")  # as for a teacher
    assert f"in.pt: {told}" in capsys.readouterr().out
    for without in ({}, {"ema": None}):
        torch.save({"model": weights()} | without, tmp_path / "in.pt")
        assert import_file(tmp_path / "in.pt", "repa", 2, 5).remarks == ()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_set_of_weights_that_is_not_asked_for_still_must_hold_tensors_alone(zipped: bool, tmp_path: Path) -> None:
    for wrong in ({"shadow": weights()}, weights() | {"extra": [torch.ones(2)]}):
        content = {"model": wrong, "ema": weights()}
        torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"in\.pt model holds more than tensors: \['(shadow|extra)'\]"):
            import_file(tmp_path / "in.pt", "repa", 2, 5, only="ema")


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [
        (10, None, "10 classes, or 9 and a null class"), (10, 10, (10, 0.0)), (10, 9, (9, 0.1)), (1, None, (1, 0.0)),
        (1001, None, (1000, 0.1)), (1000, None, (1000, 0.0)), (1000, 999, (999, 0.1)),
        (10, 8, "num_classes = 8, but"), (1, 2, "num_classes = 2, but"),
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


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [
        (10, {"class_dropout_prob": 0}, (10, 0.0)), (10, {"class_dropout_prob": 0.15}, (9, 0.1)),
        (1000, {"class_dropout_prob": 0.1}, (999, 0.1)), (1001, {"class_dropout_prob": 0.0}, (1001, 0.0)),
        (10, {"class_dropout_prob": 0.1, "num_classes": 10}, (10, 0.0)), (1, {"class_dropout_prob": 0.1}, (1, 0.0)),
    ],
)  # fmt: skip
def test_a_files_own_dropout_of_labels_tells_whether_it_has_a_null_class(
    rows: int, said: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    table = foreign.trunk(foreign.TINY, 1) | {"y_embedder.embedding_table.weight": torch.zeros(rows, 32)}
    torch.save({"ema": table, "args": argparse.Namespace(prediction="v", **said)}, tmp_path / "in.pt")
    found = import_file(tmp_path / "in.pt", None, 2).config
    assert (found.num_classes, found.class_dropout) == expected


def test_one_set_of_weights_is_not_called_two(tmp_path: Path) -> None:
    torch.save(foreign.trunk(foreign.TINY, 1), tmp_path / "in.pt")
    assert not import_file(tmp_path / "in.pt", "sit", 2, 5).averaged
    foreign.repa_checkpoint(tmp_path / "in.pt")
    assert import_file(tmp_path / "in.pt").averaged

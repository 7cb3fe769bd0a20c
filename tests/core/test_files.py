"""Headers are checked before anything is believed, paths stay inside, folders appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from st_fast.core.errors import UserError
from st_fast.core.files import (
    BadFile,
    inside,
    is_pickle,
    read_header,
    read_json,
    sha256_file,
    write_folder,
    write_json_atomic,
)


def with_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = tensor([2], [0, 8])
HOSTILE: dict[str, tuple[object, bytes, int | None, str]] = {
    "huge_header": (b"{}", b"", 2**63, "claims 9223372036854775808 bytes, at most 2"),
    "header_beyond_file": (b"{}", b"", 3, "claims 3 bytes, at most 2"),
    "not_a_header": (b"[]      ", b"", None, "does not start with"),
    "not_utf8": (b'{"\xff":0}', b"", None, "not valid JSON"),
    "not_json": (b"{nonsense", b"", None, "not valid JSON"),
    "nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None, "not valid JSON"),
    "key_twice": (b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), bytes(8), None, "twice"),
    "metadata_not_strings": ({"__metadata__": {"a": 1}, "a": GOOD}, bytes(8), None, "expected an object of strings"),
    "nan": (b'{"a":NaN}', b"", None, "not finite"),
    "half_a_character": (b'{"\\ud800":%b}' % json.dumps(GOOD).encode(), bytes(8), None, "surrogates not allowed"),
    "endless_number": (b'{"a":' + b"9" * 10_000 + b"}", b"", None, "not valid JSON"),
    "not_a_tensor": ({"a": 3}, b"", None, "expected dtype, shape and data_offsets"),
    "unknown_dtype": ({"a": tensor([2], [0, 8], "F128")}, bytes(8), None, "'F128' is none of"),
    "dtype_a_list": ({"a": tensor([2], [0, 8], [])}, bytes(8), None, "is none of"),
    "negative_shape": ({"a": tensor([-2, -1], [0, 8])}, bytes(8), None, "not a list of at most"),
    "fractional_shape": ({"a": tensor([2.0], [0, 8])}, bytes(8), None, "not a list of at most"),
    "true_as_shape": ({"a": tensor([True, 2], [0, 8])}, bytes(8), None, "not a list of at most"),
    "gigantic_shape": ({"a": tensor([2**40], [0, 2**42])}, bytes(8), None, "expected 4398046511197 bytes, found 101"),
    "gigantic_shape_small_span": ({"a": tensor([2**40], [0, 8])}, bytes(8), None, "takes 4398046511104 bytes"),
    "overflowing_shape": ({"a": tensor([2**62, 4], [0, 0])}, b"", None, "too large"),
    "overflow_behind_zero": ({"a": tensor([0, 2**62, 2**62], [0, 0])}, b"", None, "too large"),
    "many_dimensions": ({"a": tensor([1] * 10_000, [0, 4])}, bytes(4), None, "at most 32"),
    "overlap": ({"a": GOOD, "b": tensor([2], [4, 12])}, bytes(12), None, "overlaps"),
    "same_bytes_twice": ({"a": GOOD, "b": GOOD}, bytes(8), None, "overlaps"),
    "gap": ({"a": GOOD, "b": tensor([2], [12, 20])}, bytes(20), None, "gap"),
    "starts_late": ({"a": tensor([2], [4, 12])}, bytes(12), None, "gap"),
    "reversed_offsets": ({"a": tensor([2], [8, 0])}, bytes(8), None, "span -8"),
    "truncated": ({"a": tensor([4], [0, 16])}, bytes(15), None, "expected 86 bytes, found 85"),
    "trailing_bytes": ({"a": GOOD}, bytes(9), None, "expected 77 bytes, found 78"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_clear_line(case: str, tmp_path: Path) -> None:
    header, data, length, message = HOSTILE[case]
    path = with_header(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(BadFile, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_no_hostile_header_makes_us_allocate_more_than_64_mib(tmp_path: Path, child_env: dict[str, str]) -> None:
    for case, (header, data, length, _) in HOSTILE.items():
        with_header(tmp_path / f"{case}.safetensors", header, data, length)
    program = """
import pathlib, resource, sys
from st_fast.core.files import BadFile, read_header
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
refused = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    try:
        read_header(path)
    except BadFile:
        refused += 1
print(refused)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=child_env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(HOSTILE)


def test_a_good_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64), "c": torch.zeros(0, 4)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"any": "thing"})
    entries = read_header(path)
    raw = path.read_bytes()
    assert {key: (e.dtype, e.shape) for key, e in entries.items()} == {
        "a": ("F32", (2, 3)), "b": ("I64", ()), "c": ("F32", (0, 4))
    }  # fmt: skip
    for key, entry in entries.items():
        assert raw[entry.start : entry.stop] == tensors[key].numpy().tobytes()


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04"])
def test_a_pickle_is_refused_by_name(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(start + os.urandom(100))
    with pytest.raises(BadFile, match="pickle"):
        read_header(path)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": GOOD}).encode().ljust(0x0280)
    assert read_header(with_header(tmp_path / "x", text, bytes(8)))["a"].shape == (2,)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\0b", "out/x", "loop", "x" * 5000]
)
def test_a_path_may_not_leave_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "x").write_text("outside")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    if name == "loop" or len(name) > 255:  # refused here or when opened
        with pytest.raises(BadFile):
            sha256_file(inside(folder, name))
    else:
        with pytest.raises(BadFile, match="must be relative and stay inside"):
            inside(folder, name)


def test_paths_and_symlinks_that_stay_inside_are_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "real").write_text("x")
    (folder / "link").symlink_to("sub/real")
    (tmp_path / "alias").symlink_to(folder)
    for root in (folder, tmp_path / "alias"):
        assert inside(root, "link").read_text() == inside(root, "sub/real").read_text() == "x"


def test_pipes_folders_and_missing_files_are_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"pipe": "not a regular file", ".": "not a regular file", "none": "missing"}.items():
        for read in (sha256_file, read_header, read_json):
            with pytest.raises(BadFile, match=message):
                read(tmp_path / name)


def test_json_is_bounded_strict_and_an_object(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for text, message in {
        '{"a": 1, "a": 2}': "twice", "[1]": "expected a JSON object", "{": "not valid", '{"a": 1e999}': "not finite",
        "": "not valid", '{"a": -Infinity}': "not finite",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(BadFile, match=message):
            read_json(path)
    write_json_atomic(path, {"a": [1, 2.5, "é"]})
    assert read_json(path) == {"a": [1, 2.5, "é"]}
    with pytest.raises(BadFile, match="at most 5"):
        read_json(path, max_bytes=5)
    assert os.listdir(tmp_path) == ["m.json"]


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    data = os.urandom(9 * 2**20 + 13)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError), write_folder(target) as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list(target.parent.iterdir()) == []
    with write_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("whole")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "whole" and list(target.parent.iterdir()) == [target]


def test_an_existing_folder_is_refused_set_aside_or_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for text, keep in (("first", False), ("second", True), ("third", False)):
        with write_folder(target, replace=True, keep_replaced=keep) as folder:
            (folder / "x").write_text(text)
    assert sorted(tmp_path.iterdir()) == [target, tmp_path / "folder.aside-1"]
    assert (tmp_path / "folder.aside-1" / "x").read_text() == "first"
    with pytest.raises(UserError, match="exists already"), write_folder(target):
        pass
    assert (target / "x").read_text() == "third"


@pytest.mark.parametrize("length", [128, 384, 640, 896, 1152, 1408])
def test_safetensors_whose_header_is_as_long_as_a_pickles_first_bytes_are_no_pickle(
    tmp_path: Path, length: int
) -> None:
    path = tmp_path / "model.safetensors"
    empty = json.dumps({"a": GOOD, "__metadata__": {"note": ""}})
    header = json.dumps({"a": GOOD, "__metadata__": {"note": "x" * (length - len(empty))}}).encode()
    with_header(path, header, bytes(8))
    assert list(read_header(path)) == ["a"]
    assert path.read_bytes()[:8] == length.to_bytes(8, "little")
    assert not is_pickle(path)
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        assert is_pickle(path) == (protocol > 1)
    torch.save({"a": torch.ones(2)}, path)
    assert is_pickle(path)

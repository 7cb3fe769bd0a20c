"""Hostile archives, arrays and JSON are refused in one line before they cost memory or time."""

from __future__ import annotations

import io
import re
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from st_fast.core.files import FREE_BYTES, BadFile, parse_json
from st_fast.core.limits import Zip, npy_header, read_npy, tar_members


@pytest.fixture
def refused() -> Callable[..., str]:
    """Calls a function; returns its refusal, after checking that it was one line and cost neither memory nor time."""

    def call(function: Callable[[], object]) -> str:
        tracemalloc.start()
        start = time.process_time()
        try:
            with pytest.raises(BadFile) as caught:
                function()
            assert tracemalloc.get_traced_memory()[1] < FREE_BYTES
        finally:
            tracemalloc.stop()
        assert time.process_time() - start < 10
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    return call


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_a_sound_tar_gives_its_members_in_order(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", ("b/1.jpg", b"x" * 700), ("a" * 150 + "/2.jpg", b"yy"))
    found = [(m.name, path.read_bytes()[m.offset_data : m.offset_data + m.size]) for m in tar_members(path)]
    assert found == [("b/1.jpg", b"x" * 700), ("a" * 150 + "/2.jpg", b"yy")]


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 2048, 2100])
def test_a_tar_that_ends_early_is_refused_also_between_members(cut: int, tmp_path: Path, refused) -> None:
    path = tar_of(tmp_path / "a.tar", ("1.jpg", b"x" * 512), ("2.jpg", b"y" * 512))
    path.write_bytes(path.read_bytes()[:cut])
    message = refused(lambda: list(tar_members(path)))
    assert str(path) in message


def test_damage_between_members_does_not_end_a_tar_early(tmp_path: Path, refused) -> None:
    path = tar_of(tmp_path / "a.tar", ("1.jpg", b"x" * 512), ("2.jpg", b"y" * 512))
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # in the second member's header
    path.write_bytes(data)
    assert "damaged" in refused(lambda: list(tar_members(path)))


def test_sizes_beyond_a_tar_and_sparse_members_are_refused(tmp_path: Path, refused) -> None:
    words = {"is a sparse file": (tarfile.GNUTYPE_SPARSE, 512), "cut off": (tarfile.REGTYPE, 10**15)}
    for told, (kind, size) in (words | {"not a sound tar|cut off": (tarfile.XHDTYPE, 2**40)}).items():
        info = tarfile.TarInfo("huge.jpg")
        info.type, info.size = kind, size
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        if kind == tarfile.GNUTYPE_SPARSE:
            header[483:495] = tarfile.itn(10**15, 12, tarfile.GNU_FORMAT)
            header[148:155] = b"%06o\0" % tarfile.calc_chksums(bytes(header))[0]
        (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(2048))
        assert re.search(told, refused(lambda: list(tar_members(tmp_path / "a.tar"))))


def test_a_zip_bomb_an_encrypted_and_an_oddly_packed_member_are_refused(tmp_path: Path, refused) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(FREE_BYTES + 1))
        archive.writestr("fine.jpg", b"1" * 1000)
        archive.writestr("packed.jpg", b"1" * 1000, zipfile.ZIP_LZMA)
    with Zip(path) as archive:
        assert archive.member(archive.getinfo("fine.jpg")) == b"1" * 1000
        assert "would unpack" in refused(lambda: archive.member(archive.getinfo("bomb.jpg")))
        assert "compression method 14" in refused(lambda: archive.member(archive.getinfo("packed.jpg")))
        info = archive.getinfo("fine.jpg")
        info.flag_bits |= 1
        assert "encrypted" in refused(lambda: archive.member(info))
        info.flag_bits, info.CRC = 0, 0
        assert "damaged" in refused(lambda: archive.member(info))


def npy(shape: object, dtype: str = "<f4", data: bytes = b"") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        npy("(1000000000000,)"), npy("(-1,)"), npy("(True, 2)"), npy("(2**62, 4)"), npy("(1,)", "|O"), npy("(" * 3000),
        npy("(4611686018427387904, 0, 4611686018427387904)"), npy("(2,)", "|V2147483647"), npy("(2,)", data=b"\0" * 7),
        b"\x93NUMPY\2\0" + b"\xff\xff\xff\xff", b"\x93NUMPY\3\0", b"", b"\x93NUMPY\1\0\xff\xff", npy("1"),
    ],
)  # fmt: skip
def test_a_npy_that_claims_more_than_it_holds_is_refused(data: bytes, refused) -> None:
    refused(lambda: read_npy(io.BytesIO(data), len(data), "x.npy"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_sound_npy_is_read(order, tmp_path: Path) -> None:
    array = np.asarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4), order=order)
    np.save(tmp_path / "a.npy", array)
    data = (tmp_path / "a.npy").read_bytes()
    assert np.array_equal(read_npy(io.BytesIO(data), len(data), "a.npy"), array)
    header = npy_header(io.BytesIO(data), "a.npy")
    assert (header.shape, header.fortran, header.size) == ((2, 3, 4), order == "F", 48)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' + "[" * 65 + "]" * 65 + "}", '{"a":' * 5000 + "0" + "}" * 5000, '{"a": 18446744073709551616}',
        '{"a": ' + "9" * 5000 + "}", '{"x":[' + "[]," * 3_000_000 + "0]}", '{"a": -1e999}',
    ],
)  # fmt: skip
def test_json_is_bounded_in_depth_digits_and_items(text: str, refused) -> None:
    refused(lambda: parse_json(text.encode(), Path("x.json")))


def test_json_of_64_levels_and_64_bits_is_read() -> None:
    assert parse_json(('{"a":' + "[" * 63 + "]" * 63 + "}").encode(), Path("x.json"))
    assert parse_json(b'{"a": 18446744073709551615}', Path("x.json")) == {"a": 2**64 - 1}

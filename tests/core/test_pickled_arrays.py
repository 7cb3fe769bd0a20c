"""Arrays in pickles are found where they stand, and nothing else in a pickle is believed or executed."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserList

import numpy as np
import pytest

from st_fast.core.files import BadFile
from st_fast.core.limits import Npy
from st_fast.core.pickled_arrays import array_places


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 300)])  # short bytes, and those with a length of four
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_an_array_is_found_where_it_stands(protocol: int, order: str, shape: tuple[int, ...], dtype: type) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 9, dtype, order)  # type: ignore[call-overload]
    data = pickle.dumps(array, protocol)
    place = array_places(data, "x")
    assert isinstance(place, Npy) and (place.shape, place.dtype, place.fortran) == (shape, dtype, order == "F")
    flat = np.frombuffer(data, dtype, array.size, place.start)
    assert np.array_equal(flat.reshape(shape, order="F" if place.fortran else "C"), array)


def test_an_array_whose_length_takes_eight_bytes_is_found() -> None:
    """As those of 4 GiB and more."""
    array = np.arange(300, dtype=np.float32)
    told = pickle.dumps(array, 3)
    short = b"B" + (1200).to_bytes(4, "little")
    data = told.replace(short, b"\x8e" + (1200).to_bytes(8, "little"))
    place = array_places(data, "x")
    assert len(data) == len(told) + 4 and np.array_equal(pickle.loads(data), array)
    assert np.array_equal(np.frombuffer(data, place.dtype, 300, place.start), array)


def test_numbers_and_arrays_of_objects_are_places_too() -> None:
    array = np.empty(2, object)
    array[0], array[1] = np.arange(3.0), np.int32(-7)
    data = pickle.dumps(array, 4)
    inner, number = array_places(data, "x")
    assert np.array_equal(np.frombuffer(data, inner.dtype, 3, inner.start), [0, 1, 2])
    assert number.shape == () and np.frombuffer(data, number.dtype, 1, number.start)[0] == -7
    alone = array_places(data := pickle.dumps(np.float64(2.5), 4), "x")
    assert alone.shape == () and np.frombuffer(data, alone.dtype, 1, alone.start)[0] == 2.5
    assert array_places(pickle.dumps(np.zeros((1,) * 8), 4), "x").shape == (1,) * 8


def swapped(old: bytes, new: bytes) -> bytes:
    """The pickle of an array of eight numbers with other bytes in one place."""
    data = pickle.dumps(np.arange(8, dtype=np.float32), 3)
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (swapped(b"K\x08\x85", b"K\x09\x85"), r"32 bytes for an array float32 \(9,\)"),
        (swapped(b"f4", b"O8"), "asks for 'an array of O8'"),
        (swapped(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"), "byte order >"),
        (swapped(b"_reconstruct", b"_reconstruXt"), "asks for .*_reconstruXt"),
        (pickle.dumps(np.arange(8, dtype=np.complex64), 3), "an array of c8"),
        (pickle.dumps(np.zeros((1,) * 9), 3), r"shape \(1, 1, 1, 1, 1, 1, 1, 1, 1\) of an array"),
        (pickle.dumps(UserList(), 3), "asks for 'collections UserList'"),
        (pickle.dumps(OrderedDict(a=1), 3), "asks for 'collections OrderedDict'"),
        (pickle.dumps(np.arange(8.0), 3)[:-9], "not a sound pickle of arrays"),
        (b"", "not a sound pickle of arrays"),
    ],
)
def test_anything_else_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(BadFile, match=rf"^x: refused, nothing executed: .*{words}") as caught:
        array_places(data, "x")
    assert "\n" not in str(caught.value)

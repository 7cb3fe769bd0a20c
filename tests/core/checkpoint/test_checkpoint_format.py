"""What is saved comes back bit for bit, and only from a folder that is wholly what it says it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from st_fast.core.checkpoint import latest, load, match_strictly, save, valid
from st_fast.core.checkpoint.groups import DTYPES
from st_fast.core.checkpoint.store import NewerFormat
from st_fast.core.errors import UserError
from st_fast.core.files import BadFile

META = {"recipe": "[run]\nseed = 0\n", "stage": "align", "sizes": (1, 2), "by_step": {2: 0.1, 10: -1e-300}, "é": None}


def test_every_tensor_comes_back_bit_for_bit_with_its_metadata(tmp_path: Path, state: Any, same: Any) -> None:
    path = save(tmp_path, 42, state(1), META)
    loaded = load(path)
    assert path == tmp_path / "00000042" and loaded.path == path and loaded.step == 42
    assert same(loaded.groups, state(1)) and not same(loaded.groups, state(2))
    assert loaded.meta == json.loads(json.dumps(META)) and valid(path) is None
    assert sorted(os.listdir(tmp_path)) == ["00000042"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_agrees_with_the_safetensors_library_both_ways(name: str, tmp_path: Path, same: Any) -> None:
    raw = torch.randint(0, 256, (3, 4, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = raw > 127 if name == "BOOL" else raw.view(DTYPES[name])
    group = {"x": values, "scalar": values[0, 0, 0], "empty": values[:0]}
    path = save(tmp_path, 1, {"g": group}, {})
    assert same({"g": safetensors.torch.load_file(path / "g.safetensors")}, {"g": group})
    assert same(load(path).groups, {"g": group})


def test_views_and_aliases_are_written_by_value(tmp_path: Path, same: Any) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    group = {"base": base, "alias": base, "row": base[1], "transposed": base.T, "strided": base[::2, 1::2],
             "expanded": base[:1].expand(5, 6), "parameter": torch.nn.Parameter(base)}  # fmt: skip
    found = load(save(tmp_path, 0, {"g": group}, {})).groups["g"]
    assert same({"g": found}, {"g": {key: value.clone() for key, value in group.items()}})
    found["base"].zero_()
    assert found["alias"][1, 1] == 7


def test_only_the_wanted_groups_are_loaded_but_all_must_be_there(tmp_path: Path, state: Any) -> None:
    path = save(tmp_path, 3, state(0), {})
    assert list(load(path, ["ema"]).groups) == ["ema"] and load(path, []).groups == {}
    with pytest.raises(BadFile, match=r"00000003: has no group judge; it has .*model"):
        load(path, ["judge"])
    (path / "optim.safetensors").unlink()
    with pytest.raises(BadFile, match=r"optim\.safetensors: missing"):
        load(path, ["ema"])


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for groups, meta, message in (
        ({"../x": {}}, {}, "only letters"),
        ({"g": {"x": torch.zeros(2, dtype=torch.complex64)}}, {}, "'x': dtype torch.complex64"),
        ({"g": {"__metadata__": torch.zeros(2)}}, {}, "__metadata__"),
        ({"g": {}}, {"loss": float("nan")}, "not JSON compliant"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path, 1, groups, meta)
    assert os.listdir(tmp_path) == []


def test_a_newer_format_is_told_and_never_passed_over(tmp_path: Path, state: Any, forge: Any) -> None:
    save(tmp_path, 1, state(1), {})
    path = save(tmp_path, 2, state(2), {})
    forge(path, lambda manifest: manifest.update(version=3, extra="field", groups=[]))
    message = r"00000002/manifest\.json: written by a newer st_fast \(format 3; this one reads 2\)"
    with pytest.raises(NewerFormat, match=message):
        load(path)
    with pytest.raises(NewerFormat, match=message):
        latest(tmp_path, warn=lambda line: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "format is 'other', expected 'st_fast.checkpoint'"),
        (lambda m: m.update(version="1"), "version is '1', expected a whole number"),
        (lambda m: m.update(version=True), "version is True"),
        (lambda m: m.update(step=-1), "step is -1"),
        (lambda m: m.update(groups=[]), "groups is \\[\\], expected dict"),
        (lambda m: m.update(more=1), "expected an object with format, version, step, groups, meta, digest"),
        (lambda m: m["groups"].update(model=None), "group 'model' is None, expected an object"),
        (lambda m: m["groups"]["model"].update(bytes="9"), "bytes is '9', expected int"),
        (lambda m: m["groups"]["model"].update(bytes=9), "expected 9 bytes, found"),
        (lambda m: m["groups"]["model"].update(sha256="0" * 64), "SHA-256 expected 0000000000000000"),
        (lambda m: m["groups"]["model"]["tensors"].pop("weight"), "1 tensors are not as .* first is 'weight'"),
        (lambda m: m["groups"]["model"]["tensors"]["weight"].update(shape=[5, 6]), "first is 'weight'"),
        (lambda m: m["groups"]["model"].update(file="ema.safetensors"), "tensors are not as the manifest says"),
        (lambda m: m["groups"]["model"].update(file="../outside.safetensors"), "stay inside"),
        (lambda m: m["groups"]["model"].update(file="{tmp}/outside.safetensors"), "stay inside"),
        (lambda m: m["groups"]["model"].update(file="link.safetensors"), "stay inside"),
        (lambda m: m["groups"]["model"].update(file="a\nb"), r"a\\nb': missing"),
    ],
)  # fmt: skip
def test_a_forged_manifest_is_one_clear_line(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path, state: Any, forge: Any
) -> None:
    path = save(tmp_path, 5, state(0), {})
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((path / "model.safetensors").read_bytes())  # what an escape would find is a perfect copy
    (path / "link.safetensors").symlink_to(outside)

    def change_here(manifest: dict[str, Any]) -> None:
        change(manifest)
        model = manifest["groups"]["model"] if isinstance(manifest["groups"], dict) else None
        if model:
            model["file"] = model["file"].replace("{tmp}", str(tmp_path))

    forge(path, change_here)
    for read in (load, lambda p: load(p, ["model"])):
        with pytest.raises(BadFile, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert valid(path) == str(caught.value)


def test_a_manifest_edited_by_hand_is_noticed(tmp_path: Path, state: Any) -> None:
    path = save(tmp_path, 5, state(0), {"seed": 0})
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(BadFile, match=r"manifest\.json: digest expected .*its content was changed"):
        load(path)


def test_a_pickle_is_never_opened(tmp_path: Path, state: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = save(tmp_path, 7, state(0), {})
    for legacy in (False, True):
        file = tmp_path / "model.pt"
        torch.save({"bomb": Bomb()}, file, _use_new_zipfile_serialization=not legacy)
        (path / "model.safetensors").write_bytes(file.read_bytes())
        for target in (file, path):
            with pytest.raises(BadFile, match=r"model\.(pt|safetensors): a pickle or zip file \(torch\.save\)"):
                load(target)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "none": "there is no checkpoint here", "file": "not a checkpoint; expected a folder",
        "empty": "manifest.json is missing",
    }.items():  # fmt: skip
        with pytest.raises(BadFile, match=message):
            load(tmp_path / name)


def test_booleans_other_than_0_and_1_are_refused(tmp_path: Path, forge: Any) -> None:
    path = save(tmp_path, 1, {"g": {"flag": torch.tensor([True, False])}}, {})
    file = path / "g.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x02\x00")
    with pytest.raises(BadFile, match="'flag' is boolean"):
        load(path, verify=False)


def test_strict_matching_lists_every_mismatch_in_one_line() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(()), "d": torch.zeros(2)}
    match_strictly(expected, dict(expected), "checkpoint x")
    found = {"a": torch.zeros(2), "b": torch.zeros(1, 3), "d": torch.zeros(2).half(), "e": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        match_strictly(expected, found, "checkpoint x")
    assert str(caught.value) == (
        "checkpoint x: tensors do not match: 1 missing: 'c'; 1 unexpected: 'e'; 2 different: "
        "'b' (expected float32 (3,), found float32 (1, 3)), 'd' (expected float32 (2,), found float16 (2,))"
    )


def test_a_long_list_of_mismatches_is_shortened_with_its_count() -> None:
    expected = {f"blocks.{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(UserError, match=r"30 missing: 'blocks.0', .*'blocks.7' and 22 more$"):
        match_strictly(expected, {}, "teacher")

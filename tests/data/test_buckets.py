"""Latents of several shapes: which batches are made of them, by every loader, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from st_fast.core.errors import UserError
from st_fast.core.files import BadFile
from st_fast.core.random import RecordOrder
from st_fast.core.ranks import Ranks
from st_fast.data.buckets import BucketOrder, BucketSet, one_shape, write_index
from st_fast.data.loader import kept_bytes, make_loader
from st_fast.data.shards import open_data, read_any_manifest
from st_fast.data.statistics import latent_statistics, sampled_warning
from st_fast.recipe import load
from st_fast.train.batches import BatchIterator
from tests import tiny_shapes

CPU = torch.device("cpu")
SIZES, BATCH = [21, 4, 13, 4], 4
"""⌊n / 4⌋ = 5 + 1 + 3 + 1 batches an epoch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_shapes.write_data(tmp_path_factory.mktemp("shapes") / "latents")


def stream(steps: range, seed: int = 5) -> list[list[int]]:
    order = BucketOrder(seed, SIZES, BATCH)
    return [order(np.arange(step * BATCH, (step + 1) * BATCH)).tolist() for step in steps]


def test_every_batch_is_of_one_bucket_and_an_epoch_has_as_many_of_each_as_fit():
    starts = np.cumsum([0, *SIZES])
    buckets = [np.searchsorted(starts, batch, side="right") - 1 for batch in stream(range(40))]
    assert all(len(set(found)) == 1 for found in buckets)
    of_batches = [int(found[0]) for found in buckets]
    for epoch in range(4):
        assert np.bincount(of_batches[10 * epoch : 10 * epoch + 10]).tolist() == [5, 1, 3, 1]
    orders = {tuple(of_batches[10 * epoch : 10 * epoch + 10]) for epoch in range(4)}
    assert len(orders) > 2, "the buckets come in another order in every epoch"


def test_a_batch_asked_for_alone_is_that_of_the_stream_whatever_was_asked_before():
    whole, order = stream(range(60)), BucketOrder(5, SIZES, BATCH)
    for step in (43, 7, 0, 59, 19, 20, 8):
        assert order(np.arange(step * BATCH, (step + 1) * BATCH)).tolist() == whole[step]
        assert order(np.arange(step * BATCH + 1, step * BATCH + 3)).tolist() == whole[step][1:3]
    assert order(np.arange(9 * BATCH + 2, 11 * BATCH)).tolist() == [*whole[9][2:], *whole[10]]
    assert stream(range(20), seed=6) != whole[:20]
    for step in range(45):
        assert stream(range(step, step + 1)) == [whole[step]]


def test_no_record_of_a_bucket_is_left_out_and_it_has_the_order_that_it_has_alone():
    seen = [record for batch in stream(range(210)) for record in batch]
    starts = np.cumsum([0, *SIZES])
    for start, size, of_epoch in zip(starts, SIZES, (5, 1, 3, 1), strict=False):
        own = [record - start for record in seen if start <= record < start + size]
        assert len(own) == 21 * of_epoch * BATCH
        assert own == RecordOrder(5, size)(np.arange(len(own))).tolist()
        for first in range(0, len(own) - size + 1, size):
            assert sorted(own[first : first + size]) == list(range(size))


@pytest.mark.parametrize("kind", ["resident", "torch", "auto"])
def test_every_loader_gives_the_records_in_their_own_shape_as_the_files_have_them(kind, folder):
    records = open_data(folder)
    assert isinstance(records, BucketSet) and len(records) == 44
    truth = [
        (moments, label)
        for name in tiny_shapes.SIDES
        for path in sorted((folder / name).glob("*.safetensors"))
        for tensors in [load_file(path)]
        for moments, label in zip(tensors["moments"], tensors["labels"], strict=True)
    ]
    requests = [np.array([3, 0, 20]), np.array([43, 34]), np.array([21, 33, 22, 22]), np.array([20])]
    loader = make_loader(kind, records, CPU, print)
    for request, (moments, labels) in zip(requests, loader.stream(requests), strict=True):
        assert np.array_equal(moments.numpy(), np.stack([truth[i][0] for i in request]))
        assert labels.tolist() == [truth[i][1] for i in request]
    loader.close()
    assert kept_bytes("resident", records, CPU) == (sum(m.nbytes for m, _ in truth),) * 2
    records.close()


def test_all_shapes_have_one_manifest_whose_digest_changes_with_any_of_them(folder, tmp_path):
    records = open_data(folder)
    assert read_any_manifest(folder) == records.manifest and records.manifest.count == 44
    assert records.manifest.shape == (8, 12, 12) and records.digest == records.manifest.digest
    assert one_shape(open_data(folder / "80x112"), "a test").manifest.shape == (8, 10, 14)
    others = tiny_shapes.write_data(tmp_path / "others")
    assert open_data(others).digest == records.digest
    tiny_shapes.write_bucket(tmp_path / "more", "144x64", count=11)
    for path in (tmp_path / "more" / "144x64").iterdir():
        path.replace(others / "144x64" / path.name)
    write_index(others, list(tiny_shapes.SIDES))
    assert open_data(others).digest != records.digest


def test_the_batches_of_a_run_follow_from_the_step_and_ranks_share_them(folder, tmp_path):
    recipe = load(tiny_shapes.write_recipe(tmp_path / "t.toml", folder, tmp_path / "out"))

    def batches(first: int, last: int, rank: int = 0, count: int = 1):
        records = open_data(folder, verify=False)
        loader = make_loader("torch", records, CPU, lambda line: None)
        for (batch,) in BatchIterator(recipe, recipe.stages[0], loader, records, Ranks(rank, count, CPU)).steps(
            first, last
        ):
            yield batch

    whole = list(batches(0, 12))
    assert {batch.x.shape[1:] for batch in whole} == {(4, *sides) for sides in tiny_shapes.SIDES.values()}
    for left, right in zip(whole[7:], batches(7, 12), strict=True):
        assert torch.equal(left.x_t, right.x_t) and torch.equal(left.velocity, right.velocity)
    for left, *parts in zip(whole, batches(0, 12, 0, 2), batches(0, 12, 1, 2), strict=True):
        for name in ("x", "x_t", "velocity", "noise", "t", "condition", "student_condition", "ordinals"):
            assert torch.equal(getattr(left, name), torch.cat([getattr(part, name) for part in parts]))


REFUSED = {
    "another scale": ({"scale": 0.5}, r"buckets.json: 80x112 has normalisation = .*96x96 has "),
    "other channels": ({"channels": 3}, r"buckets.json: 80x112 has channels = 3, 96x96 has 4"),
}


@pytest.mark.parametrize("difference", REFUSED)
def test_buckets_that_do_not_go_together_are_named(difference, tmp_path):
    given, words = REFUSED[difference]
    tiny_shapes.write_bucket(tmp_path, "96x96")
    tiny_shapes.write_bucket(tmp_path, "80x112", **given)
    write_index(tmp_path, ["96x96", "80x112"])
    with pytest.raises(BadFile, match=words) as caught:
        open_data(tmp_path)
    assert "\n" not in str(caught.value)


def changed(folder: Path, **fields: object) -> None:
    path = folder / "buckets.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BUCKET = {"folder": "96x96", "count": 21, "digest": "0" * 64}
DAMAGE = {
    "another format": ({"format": "st_fast.latents"}, "format = 'st_fast.latents'"),
    "a newer version": ({"version": 2}, "version = 2"),
    "nothing listed": ({"buckets": []}, "buckets: 0: 1 to 64 are possible"),
    "twice": ({"buckets": [BUCKET, BUCKET]}, "none listed twice"),
    "too many": ({"buckets": [BUCKET | {"folder": f"{n}x8"} for n in range(1, 70)]}, "buckets: 69: 1 to 64"),
    "elsewhere": ({"buckets": [BUCKET | {"folder": "../96x96"}]}, "folder = '../96x96'"),
    "another manifest": ({"buckets": [BUCKET]}, "96x96 is not the set that was listed"),
    "another count": ({"buckets": [BUCKET | {"count": -1}]}, "count = -1"),
    "a bucket that is not there": ({"buckets": [BUCKET | {"folder": "7x7"}]}, "7x7.*no such folder"),
    "strangers": ({"more": 1}, "the field 'more' is unknown"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_is_none_or_differs_from_its_folders_is_refused_in_one_line(damage, tmp_path):
    fields, words = DAMAGE[damage]
    changed(tiny_shapes.write_data(tmp_path / "set"), **fields)
    with pytest.raises(BadFile, match=words) as caught:
        open_data(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_a_bucket_with_less_than_a_batch_is_named_with_both_remedies(folder):
    words = (
        r"needs 11 records \(--optim.batch_size\), and 144x64 has 10: take a smaller batch, or prepare with fewer --b"
    )
    with pytest.raises(UserError, match=words):
        open_data(folder, at_least=11)
    assert len(open_data(folder, at_least=10)) == 44
    with pytest.raises(ValueError, match="a bucket of 10 records, a batch of 11"):
        BucketOrder(0, [44, 10], 11)


def test_shards_of_another_shape_in_a_set_without_buckets_are_refused(folder, tmp_path):
    for name in ("96x96", "144x64"):
        tiny_shapes.write_bucket(tmp_path, name, count=8)
    (tmp_path / "144x64" / "latents-00000.safetensors").replace(tmp_path / "96x96" / "latents-00000.safetensors")
    with pytest.raises(BadFile, match=r"latents-00000\.safetensors: holds .*; the manifest asks for"):
        open_data(tmp_path / "96x96")


def test_verifying_reads_every_bucket_and_closing_ends_all_of_them(folder, tmp_path):
    records, beats = open_data(folder, verify=False), []
    records.verify(lambda: beats.append(1))
    assert len(beats) == 7  # shards
    records.close()
    for name in tiny_shapes.SIDES:
        with pytest.raises(IndexError):
            records.sets[name].gather(np.array([0]))
    damaged = tiny_shapes.write_data(tmp_path / "damaged")
    path = sorted((damaged / "144x64").glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BadFile, match="144x64/latents-00001"):
        open_data(damaged)


def test_statistics_are_over_all_shapes(folder):
    records = open_data(folder, verify=False)
    chosen = np.array([43, 0, 21, 22, 5, 40])
    groups = records.by_shape(chosen)
    assert [group.tolist() for group in groups] == [[0, 5], [21, 22], [43, 40]]
    found = latent_statistics(records, chosen)
    latents = [moments[0].double().numpy() * 0.75 for group in groups for moments in records.gather(group)[0].split(1)]
    means = np.stack([one[:4].mean((1, 2)) for one in latents])
    second = np.stack([(one[:4] ** 2).mean((1, 2)) + (one[4:] ** 2).mean((1, 2)) for one in latents])
    np.testing.assert_allclose(found.mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(second.mean(0) - means.mean(0) ** 2), rtol=1e-6)
    assert sampled_warning(records) == ""


def test_what_takes_one_shape_refuses_several_and_so_do_records_of_two_shapes_at_once(folder):
    records = open_data(folder, verify=False)
    with pytest.raises(UserError, match=r"latents of several shapes; a test takes one: name one of .*96x96, .*80x112"):
        one_shape(records, "a test")
    with pytest.raises(ValueError, match="records of 2 shapes at once"):
        records.gather(np.array([20, 21]))
    with pytest.raises(UserError, match=r'data\.loader = "dali": not for latents of several shapes'):
        make_loader("dali", records, CPU, print)

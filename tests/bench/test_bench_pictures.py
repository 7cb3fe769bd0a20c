"""Sweeps go on where they stopped, and pictures show what was measured: points by hand, files that are there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import ablations, pictures, report
from bench.machine import Row, Store
from bench.workload import Setup
from tests.bench.test_bench_report import MACHINE, op_row

CPU = torch.device("cpu")


def step_row(batch: int, tokens: int = 256, depth: int = 12, stage: str = "plain", rate: float = 4.0) -> Row:
    return {
        "size": "S/2", "stage": stage, "batch": batch, "tokens": tokens, "depth": depth,
        "images_per_s": {"ours": rate, "plain": 2.0}, "mfu": {"ours": 0.7}, "ms": {"ours": 1e3 * batch / rate},
        "gflop_per_image": 36.0, "supervised": 0.0,
    }  # fmt: skip


def test_the_points_cover_what_the_picture_shows_and_the_cheap_ones_come_first(monkeypatch):
    monkeypatch.setattr(ablations, "free_memory", lambda device: 16 * 2**30)
    few = ablations.sweep_points(CPU, few=True)
    work = [ablations._work(setup) for setup in few]
    assert work == sorted(work) and len(set(few)) == len(few)
    for points in (few, ablations.sweep_points(CPU, few=False)):
        plain = [p for p in points if p.stage == "plain" and p.size == "S/2"]
        assert {p.tokens for p in plain} >= {64, 256} and {p.depth for p in plain} >= {0, 3, 6}
        assert len({p.batch for p in plain}) >= 5 and {p.stage for p in points} == {"plain", "stage 1", "stage 2"}


def test_points_that_do_not_fit_into_free_memory_are_left_out(monkeypatch):
    sizes = list[int]()
    for free in (0, 2**30, 4 * 2**30, 16 * 2**30):
        monkeypatch.setattr(ablations, "free_memory", lambda device, free=free: free)
        sizes.append(len(ablations.sweep_points(CPU, few=True)))
    assert sizes[0] == 0 and sizes == sorted(set(sizes))


def test_a_series_differs_in_one_thing_only():
    rows = [step_row(1), step_row(8), step_row(8, tokens=64), step_row(8, depth=3), step_row(8, tokens=1024)]
    assert [row["tokens"] for row in pictures.series(rows, "tokens")] == [64, 256, 1024]
    assert [(row["batch"], row["tokens"], row["depth"]) for row in pictures.series(rows, "batch")] == [
        (1, 256, 12), (8, 256, 12),
    ]  # fmt: skip


def test_an_ops_place_under_the_ceiling_is_its_operations_a_byte_and_its_share_of_what_bounds_it():
    machine = dataclasses.asdict(MACHINE)
    # x' = x + gate·a: two operations; backward: dx'·gate, and dx'·a with its sum: three.
    assert pictures.operations_an_element("gate_residual", "S/2") == pytest.approx(5, abs=0.1)
    # D → 4·D with a bias, and two gradients; the sum over rows for the bias.
    for size, width in (("S/2", 384), ("B/2", 768)):
        assert pictures.operations_an_element("linear", size) == pytest.approx(3 * 2 * 4 * width, rel=0.01)
    moved = 10.0e9 * 1e-3  # gb_per_s for ms
    elements = 8 * 256 * 384
    (copied,) = pictures.kernel_points({"a": op_row("gate_residual", 2.0)}, machine).values()
    assert copied == pictures.Point(pytest.approx(5 * elements / moved, rel=0.02), 0.5)
    (product,) = pictures.kernel_points({"a": op_row("linear", 2.0)}, machine).values()
    operations = 24 * 384 * elements
    assert product.intensity == pytest.approx(operations / moved, rel=0.01)
    assert product.share == pytest.approx(operations / 1e-3 / MACHINE.matmul_rate, rel=0.01)


def test_a_steps_place_is_its_flops_over_its_products_bytes():
    row = step_row(8) | {"parts": {"floor": {"product_flops": 2.6e11, "products": 2.0}}}
    machine = dataclasses.asdict(MACHINE)
    found = pictures.step_points({"a": row}, machine)
    assert list(found) == ["S/2, plain", "S/2, plain: its products alone"]
    step, alone = found.values()
    assert step.share == 0.7 and alone.share == pytest.approx(2.6e11 / 2.0 / MACHINE.matmul_rate)
    assert step.intensity / alone.intensity == pytest.approx(36e9 * 8 / 2.6e11)
    parameters = ablations._model(Setup("S/2", "plain", 8, CPU)).parameters
    least = 3 * 4 * parameters  # every weight is read twice and its gradient written, at the very least
    assert 0 < 36e9 * 8 / step.intensity - least < 50 * least


def test_both_pictures_are_drawn_beside_the_results_and_the_page_shows_them(tmp_path):
    store = Store(tmp_path, MACHINE)
    assert pictures.draw(store.path) == [] and not list(tmp_path.glob("*.png"))
    store.put("kernels", "a", op_row("align", 2.0))
    for number, row in enumerate([step_row(1), step_row(8), step_row(8, depth=3), step_row(8, stage="stage 2")]):
        store.put("sweep", str(number), row)
    assert len(pictures.draw(store.path)) == 2
    names = [f"{store.path.stem}-growth.png", f"{store.path.stem}-roofline.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    text = report.all_tables(tmp_path, brief=True)
    assert "![How the step grows](" in text and all(name in text for name in names)
    assert "How the step grows" not in text.split("Not measured here")[1].splitlines()[0]


def test_a_part_with_nothing_in_it_draws_nothing(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert pictures.draw(tmp_path / "a.json") == [] and list(tmp_path.iterdir()) == [tmp_path / "a.json"]

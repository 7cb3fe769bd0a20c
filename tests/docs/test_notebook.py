"""The tutorial "your model": the notebook runs as it stands, and its code resumes to the same bits."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file

import st_fast
from tests import tiny
from tests.train.test_api import Raising

NOTEBOOK = tiny.ROOT / "docs" / "tutorials" / "your-model.ipynb"
CODE = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
FIRST = "\n".join(CODE[:4])
"""Dataset, module, recipe with training, and samples."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook after it ran in a kernel of its own, and the folder where it did."""
    folder, book = tmp_path_factory.mktemp("notebook"), nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tiny.ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(book, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    return book, folder


def last(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """All tensors of the stage's newest checkpoint."""
    newest = sorted((run / stage / "checkpoints").iterdir())[-1]
    return {f"{f.stem}/{key}": t for f in newest.glob("*.safetensors") for key, t in load_file(f).items()}


def test_dataset_module_training_and_samples_take_25_lines_beside_imports() -> None:
    lines = [line for line in FIRST.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
    assert len(lines) <= 25 and max(map(len, lines)) <= 120


def test_the_notebook_draws_digits_and_writes_its_report(ran) -> None:
    book, folder = ran
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert (folder / "runs" / "own" / "report.html").is_file()
    assert "own/report.html | Net" in "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_its_code_resumes_to_the_same_bits(ran, tmp_path, monkeypatch) -> None:
    """Interrupted in stage 2, by a callback that raises: the same as the notebook's run, which was not."""
    _, folder = ran
    monkeypatch.chdir(tmp_path)
    before, real, names = torch.get_num_threads(), st_fast.Trainer, dict[str, Any]()
    torch.set_num_threads(1)
    try:
        with monkeypatch.context() as patch, pytest.raises(st_fast.RunFailed, match="transcend is saved at step 70"):
            patch.setattr(st_fast, "Trainer", partial(real, callbacks=[Raising("transcend", 70)]), raising=False)
            exec(FIRST, names)
        exec(FIRST, names)
    finally:
        torch.set_num_threads(before)
    for stage in ("align", "transcend"):
        one, two = last(folder / "runs" / "own", stage), last(tmp_path / "runs" / "own", stage)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert names["images"].shape == (40, 1, 8, 8) and names["images"].abs().max() < 3

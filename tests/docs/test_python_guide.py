"""The code of the Python guide runs as it stands, block after block, and does what the page says."""

import re

import pytest
import torch

from tests import tiny

PAGE = (tiny.ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """What all blocks have defined, after they ran in an empty folder."""
    found: dict = {}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(tmp_path_factory.mktemp("guide"))
        torch.manual_seed(0)
        for block in BLOCKS:
            before = {name: [p.detach().clone() for p in module.parameters()] for name, module in networks(found)}
            exec(compile(block, "docs/python.md", "exec"), found)
            for name, module in networks(found):
                if name in before and name in ("teacher", "frozen"):  # nobody trains it
                    assert all(map(torch.equal, before[name], module.parameters())), name
    return found


def networks(names: dict) -> list[tuple[str, torch.nn.Module]]:
    return [(name, thing) for name, thing in names.items() if isinstance(thing, torch.nn.Module)]


def test_its_module_trains_both_stages_and_is_drawn_from(names) -> None:
    assert [record["stage"] for record in names["run"].log("end")] == ["align", "transcend"]
    assert names["drawn"].shape == (6, 4, 8, 8) and names["of_labels"].tolist() == [3, 7, 3, 7, 3, 7]
    assert type(names["module"]).__name__ == "Net" and len(names["losses"]) == 2


def test_its_own_loss_is_trained(names) -> None:
    assert all(record["aux"] > 0 for record in names["timed_run"].log("train"))


def test_its_loops_train_students_and_leave_teachers_alone(names) -> None:
    assert names["trainer"].global_step == 4
    assert torch.isfinite(names["loss"]) and not any(p.requires_grad for p in names["teacher"].parameters())
    trained = list(names["supervise"].parameters())
    assert trained and names["optimizer"].state[trained[0]]["step"] == 4  # the diffusers loop's

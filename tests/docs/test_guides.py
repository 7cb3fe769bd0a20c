"""README, CONTRIBUTING and docs/*.md: links lead somewhere, commands are understood, recipes are there."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from st_fast.__main__ import COMMANDS, module_of
from st_fast.core.errors import UserError
from st_fast.recipe import load
from st_fast.train import __main__ as train
from st_fast.train import plan
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", "bench/GPU-DAY.md")]
GUIDES = sorted(
    {*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")} - {ROOT / "docs" / "README.md"}
)
PAGES += [ROOT / "docs" / "README.md", *GUIDES]
ROOMS = r"(?:st_fast|kernels|csrc|bench|tests|docs|recipes)"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub turns them into anchors."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(page: Path) -> list[str]:
    """The links of a page, other than to the web, that lead nowhere."""
    text, broken = page.read_text(encoding="utf-8"), []
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def commands(text: str) -> list[tuple[str, str]]:
    """(name, the rest of the line) of every `st-fast NAME …` and `-m st_fast.NAME …` in a page's code."""
    shell = [
        body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language in ("sh", "bash", "console")
    ]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    lines = [line for block in shell for line in block.splitlines()] + spans
    return [pair for line in lines for pair in re.findall(r"(?:-m st_fast[. ]|\bst-fast )([\w.-]+)([^|)&;]*)", line)]


def misunderstood(name: str, rest: str) -> str:
    """Why a command would be refused for how it is written, or ""."""
    if name == "completion" or name == "NAME":
        return ""
    if name not in COMMANDS:
        return "" if importlib.util.find_spec(f"st_fast.{name}") else "no such module"
    arguments = shlex.split(re.sub(r"<[^<>]*>", "1", rest), comments=True)
    if not arguments or "…" in rest or "--help" in arguments:
        return ""
    try:
        check(name, [a for a in arguments if a != "--debug"])
    except (UserError, argparse.ArgumentError) as error:
        return str(error)
    except SystemExit:
        return "argparse refuses it"
    return ""


def not_runnable(text: str) -> list[str]:
    """The modules of `python -m st_fast.NAME` in a page that `python -m` does not run."""
    found = []
    for name in set(re.findall(r"-m st_fast\.([a-z][\w.]*\w)", text)):
        spec = importlib.util.find_spec(f"st_fast.{name}")
        package = spec is not None and spec.submodule_search_locations is not None
        if spec is None or (package and importlib.util.find_spec(f"st_fast.{name}.__main__") is None):
            found.append(name)
    return found


def has_module(path: str) -> bool:
    """Whether a/b/c is a module, or a name in one."""
    return any(
        (ROOT / f"{part}.py").exists() or (ROOT / part / "__init__.py").exists()
        for part in (path, path.rpartition("/")[0])
    )


def check(name: str, arguments: list[str]) -> None:
    """Reads the arguments as the command would, without doing anything."""
    if name == "train":
        recipe, overrides, _ = train.parse(arguments)
        if Path(recipe).parts[0] == "recipes":
            load(ROOT / recipe, overrides)
    elif name == "doctor" and "--plan" in arguments:
        plan.parser().parse_args(arguments[arguments.index("--plan") + 1 :])
    else:
        module_of(name).parser().parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_understood(page: Path) -> None:
    assert not_runnable(page.read_text("utf-8")) == []
    problems = {f"{name}{rest}": misunderstood(name, rest) for name, rest in commands(page.read_text("utf-8"))}
    assert {command: problem for command, problem in problems.items() if problem} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_named_exists(page: Path) -> None:
    """Such as `st_fast/train/step.py`, `bench/day_*.py` or `python -m bench.report`; not kernels/<op>.py, links, nor
    files that the page has the text of, whose first line says so."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w./[-]){ROOMS}/(?:[\w.*/-]*[\w*])?(?![\w<>])", text)
    modules = [name.replace(".", "/") for name in re.findall(r"(?:-m |\b)((?:bench|tests|st_fast)(?:\.\w+)+)", text)]
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/"))) and f"```python\n# {path}\n" not in text]
    assert missing == [] and [name for name in modules if not has_module(name)] == []
    for name, path in re.findall(r"`(\w+)`(?: in | \()`([\w/]+/\w+\.py)`", text):
        assert re.search(rf"^ *(?:def |class )?{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.M), (name, path)


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One two: `three`\n## One\n## One\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# A\n[x](b.md#one-two-three) [x](#a) [x](b.md#one-1) [y](c.md) [z](b.md#two) `[code](d.md)` [w](#b)"
    )
    assert broken_links(page) == ["c.md", "b.md#two", "#b"]
    text = "```sh\npython -m st_fast.prepare a \\\n  b --size big\n```\n`-m st_fast.nowhere` `-m st_fast.train a.toml`"
    (first, second, third) = commands(text)
    assert "an integer is needed" in misunderstood(*first) and misunderstood(*second) == "no such module"
    assert misunderstood(*third) == "" and "--ot is unknown" in misunderstood("report", " --ot x")
    assert "batch_sise" in misunderstood("train", " recipes/digits.toml --optim.batch_sise=3")
    assert "no such file" in misunderstood("train", " recipes/none.toml")
    assert "--per-node four" in misunderstood("doctor", " --plan recipes/digits.toml --per-node four")


def python_blocks(page: str) -> list[str]:
    return [body for language, body in FENCE.findall((ROOT / "docs" / page).read_text("utf-8")) if language == "python"]


def test_the_kernels_page_uses_ops_as_they_are() -> None:
    import torch

    from st_fast.kernels import reference

    names: dict = {}
    exec(python_blocks("kernels.md")[0], names)
    expected = reference.norm_modulate(names["x"], names["shift"], names["scale"])
    torch.testing.assert_close(names["y"], expected)


def test_the_kernels_page_has_a_block_of_layers_and_patches_a_model() -> None:
    pytest.importorskip("diffusers")
    from torch import nn

    blocks = python_blocks("kernels.md")
    layers, patched = (next(block for block in blocks if word in block) for word in ("AdaLNModulate", "patch(model)"))
    names: dict = {}
    exec(layers.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), names)
    block, x, c = names["block"], names["torch"].randn(2, 16, 64), names["torch"].randn(2, 64)
    shift, scale, gate, shift_mlp, scale_mlp = block.modulation(c).unsqueeze(1).chunk(5, dim=-1)
    h = x + gate * block.mix(nn.functional.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift)
    expected = h + block.mlp(nn.functional.layer_norm(h, (64,), eps=1e-6) * (1 + scale_mlp) + shift_mlp)
    names["torch"].testing.assert_close(block(x, c), expected, atol=1e-5, rtol=1e-5)
    exec(patched, names)
    assert f"# {names['told']}\n" in patched and names["unpatch"](names["model"]) == 4


LIFTED = """
import torch
from mymodel.kernels.adaln.definition import norm_modulate as definition
from mymodel.kernels.adaln.op import norm_modulate
inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 20), (2, 20), (2, 20))]
doubles = [x.detach().double().requires_grad_() for x in inputs]
weights = torch.randn(2, 3, 20)
(torch.compile(norm_modulate, backend="aot_eager", fullgraph=True)(*inputs) * weights).sum().backward()
(definition(*doubles) * weights).sum().backward()
for ours, theirs in zip(inputs, doubles, strict=True):
    torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=1e-5, rtol=1e-5)
assert torch.ops.mymodel.norm_modulate
"""


def test_the_kernels_page_lifts_a_folder_that_then_has_the_right_gradients(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    shell = next(body for language, body in FENCE.findall(page) if language == "sh" and "cp -r" in body)
    subprocess.run(["bash", "-ec", shell.replace("path/to/st_fast", str(ROOT))], cwd=tmp_path, check=True)
    namespace = next(block for block in python_blocks("kernels.md") if "add_op_namespace_prefix" in block)
    (tmp_path / "mymodel" / "kernels" / "_ops.py").write_text(namespace)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = warm.run("-c", LIFTED, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "page"),
    [("convert", "convert.md"), ("real-images", "data.md"), ("prepare", "data.md"), ("probe", "scores.md")],
)
def test_a_page_has_every_option_of_its_command(command: str, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    options = {option for action in module_of(command).parser()._actions for option in action.option_strings}
    assert [o for o in options - {"-h", "--help"} if not re.search(rf"{o}(?![\w-])", text)] == []


def test_the_index_has_every_guide() -> None:
    linked = LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in GUIDES} <= set(linked)
    assert len(linked) == len(set(linked))


def test_the_built_pages_have_no_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc isn't installed: make docs")
    build = [sys.executable, str(ROOT / "docs" / "build.py"), str(tmp_path)]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "api" / "st_fast" / "model.html").is_file()
    assert {"index.html", "docs.html", *(f"{page.stem}.html" for page in GUIDES)} <= set(os.listdir(tmp_path))
    for page in tmp_path.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        for target in re.findall(r'(?:href|src)="([^"]+)"', html):
            path, _, anchor = target.partition("#")
            if not re.match(r"[a-z]+:", path):
                other = (page.parent / path).resolve() if path else page
                assert other.exists() and other.is_relative_to(tmp_path), f"{page.name}: {target}"
                assert not anchor or f'id="{anchor}"' in other.read_text(encoding="utf-8"), f"{page.name}: {target}"

"""Code is run as it was when a record was made, in a tree of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from st_fast.core.errors import Interrupted, RunFailed, UserError
from st_fast.study.speedrun import origin
from st_fast.study.speedrun.origin import Code
from tests.tiny import ROOT


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Callable[..., str]:
    """A clone with one file of code, in place of this one; calls git in it."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path / "clone", check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "clone" / "st_fast").mkdir(parents=True)
    git("init", "-q")
    (tmp_path / "clone" / "st_fast" / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(origin, "ROOT", tmp_path / "clone")
    return git


def test_code_is_run_as_it_was(repository, tmp_path: Path) -> None:
    file = tmp_path / "clone" / "st_fast" / "a.py"
    first = origin.current_code()
    assert first == Code(repository("rev-parse", "HEAD").strip(), "")
    with origin.tree_of(first) as tree:
        assert tree == tmp_path / "clone"
    file.write_text("x = 2\n")
    changed = origin.current_code()
    assert changed.revision == first.revision and "+x = 2" in changed.changes
    repository("commit", "-qam", "three", "--allow-empty")
    file.write_text("x = 3\n")
    (tmp_path / "clone" / "st_fast" / "_csrc_cpu_abc.so").write_bytes(b"built")
    for code, text in ((first, "x = 1\n"), (changed, "x = 2\n")):
        with origin.tree_of(code) as tree:
            assert tree != tmp_path / "clone" and (tree / "st_fast" / "a.py").read_text() == text
            assert (tree / "st_fast" / "_csrc_cpu_abc.so").read_bytes() == b"built"
        assert not tree.exists() and file.read_text() == "x = 3\n" and "clone" in repository("worktree", "list")
    assert len(repository("worktree", "list").splitlines()) == 1


def test_what_this_clone_has_not_in_its_history_is_unread(repository, tmp_path: Path) -> None:
    clone, first = tmp_path / "clone", origin.current_code()
    file = clone / "st_fast" / "a.py"
    assert origin.unread(first) == []
    repository("checkout", "-qb", "theirs")
    (clone / "sitecustomize.py").write_text("run = 'where a tree is on the path'\n")
    repository("add", ".")
    repository("commit", "-qm", "theirs")
    theirs = origin.current_code()
    repository("checkout", "-q", "-")
    file.write_text("x = 4\n")
    repository("commit", "-qam", "ours")
    assert origin.unread(theirs) == ["sitecustomize.py"] and origin.unread(first) == []
    with pytest.raises(UserError, match=r"changes\.diff doesn't apply"):
        origin.unread(replace(first, changes="nonsense\n"))
    assert origin.state(origin.current_code()) != origin.state(first)
    later = origin.current_code()
    (clone / "page.md").write_text("a document")
    repository("add", ".")
    repository("commit", "-qm", "a page")
    assert origin.current_code().revision != later.revision
    assert origin.state(origin.current_code()) == origin.state(later)


def test_a_diff_is_the_same_whatever_git_is_told_by_its_user(repository, tmp_path: Path) -> None:
    file = tmp_path / "clone" / "st_fast" / "a.py"
    file.write_bytes(b"".join(b"x = %d\n" % number for number in range(20)))
    repository("commit", "-qam", "longer")
    file.write_bytes(file.read_bytes().replace(b"x = 9\n", b"x = 9  \r\n# a\rb\n"))
    plain = origin.current_code()
    for setting in (
        ("diff.noprefix", "true"), ("color.ui", "always"), ("diff.mnemonicPrefix", "true"), ("diff.context", "0"),
        ("apply.whitespace", "error"), ("apply.ignoreWhitespace", "change"),
    ):  # fmt: skip
        repository("config", *setting)
        assert origin.current_code() == plain and origin.unread(plain) == ["st_fast/a.py"]
    with origin.tree_of(plain) as tree:
        assert (tree / "st_fast" / "a.py").read_bytes() == file.read_bytes()


RENAME = """diff --git a/st_fast/a.py b/st_fast/z.py
similarity index 100%
rename from st_fast/a.py
rename to st_fast/z.py
"""
LINK = """diff --git a/st_fast/l b/st_fast/l
new file mode 120000
--- /dev/null
+++ b/st_fast/l
@@ -0,0 +1 @@
+a.py
\\ No newline at end of file
"""
TAB = 'diff --git "a/st_fast/a\\tz.py" "b/st_fast/a\\tz.py"\nnew file mode 100644\n--- /dev/null\n'
TAB += '+++ "b/st_fast/a\\tz.py"\n@@ -0,0 +1 @@\n+x\n'


def test_a_diff_is_known_by_the_files_that_it_changes(repository, tmp_path: Path) -> None:
    code = origin.current_code()
    assert sorted(origin.unread(replace(code, changes=RENAME))) == ["st_fast/a.py", "st_fast/z.py"]
    assert origin.unread(replace(code, changes=TAB)) == ["st_fast/a\tz.py"]
    with pytest.raises(UserError, match="st_fast/l: a link, where code has to be files"):
        origin.unread(replace(code, changes=LINK))


def test_a_process_runs_the_code_of_its_tree(tmp_path: Path, monkeypatch) -> None:
    """Also where the working directory has another st_fast, as this clone's root has."""
    tree = tmp_path / "tree"
    (tree / "st_fast").mkdir(parents=True)
    (tree / "st_fast" / "__init__.py").write_text("")
    main_file = tree / "st_fast" / "__main__.py"
    main_file.write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{__file__} {os.environ[\"OMP_NUM_THREADS\"]}')\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.chdir(ROOT)
    said = tmp_path / "said"
    origin.run_in(tree, [str(said), "0"], 3)
    assert said.read_text() == f"{main_file} 3"
    with pytest.raises(RunFailed, match="ended with exit code 2; what is wrong stands above"):
        origin.run_in(tree, [str(said), "2"], 3)
    with pytest.raises(Interrupted):
        origin.run_in(tree, [str(said), "75"], 3)


def test_code_that_git_cannot_name_is_refused(repository, tmp_path: Path) -> None:
    code = origin.current_code()
    with pytest.raises(UserError, match=r"revision aaaaaaaaaaaa: this clone of st_fast has no such commit"):
        origin.check_revision("a" * 40)
    with (
        pytest.raises(UserError, match=r"doesn't apply to revision"),
        origin.tree_of(replace(code, changes="nonsense")),
    ):
        pass
    (tmp_path / "clone" / "st_fast" / "b.py").write_text("y = 1\n")
    for name in (origin.current_code, origin.code_here):
        with pytest.raises(UserError, match=r"b\.py: git doesn't know this file"):
            name()


def test_a_file_that_a_record_adds_is_known_where_it_runs(repository, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "clone" / "st_fast" / "b.py").write_text("y = 1\n")
    repository("add", "st_fast/b.py")
    code, here = origin.current_code(), origin.code_here()
    repository("commit", "-qm", "later", "--", "st_fast/b.py")
    (tmp_path / "clone" / "st_fast" / "a.py").write_text("x = 7\n")
    with origin.tree_of(code) as tree:
        monkeypatch.setattr(origin, "ROOT", tree)
        assert (tree / "st_fast" / "b.py").exists() and origin.code_here() == here


def test_code_outside_of_a_clone_is_known_by_its_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(origin, "ROOT", tmp_path)
    hashes = []
    for name in ("st_fast/a.py", "kernels/b.cu", "kernels/b.txt", "other/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
        hashes.append(origin.code_here())
    assert len(set(hashes[:2])) == 2 and hashes[1] == hashes[2] == hashes[3]
    for needs_one in (origin.current_code, lambda: origin.check_revision("a" * 40)):
        with pytest.raises(UserError, match="no clone of st_fast's repository"):
            needs_one()

"""Builds the documentation into a folder: the guides as pages in the order of docs/README.md, the docstrings by pdoc.

python docs/build.py build/docs

The folder holds everything that its pages link to, by relative links, so that it can be moved or served from anywhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from html import escape
from pathlib import Path

import markdown2
import pdoc
import pdoc.render

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "docs" / "README.md"
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><style>
:root {{ --text: #1c1e21; --page: #fff; --box: #f3f4f6; --line: #ccc; --link: #0b57d0 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #dfe2e6; --page: #16181b; --box: #23272c; --line: #444a52; --link: #8ab4f8 }}
}}
body {{ max-width: 56rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page) }}
a {{ color: var(--link) }} nav a {{ margin-right: 1rem; white-space: nowrap }} nav b {{ margin-right: 1rem }}
pre, code {{ font-size: .9rem; background: var(--box) }} pre {{ padding: .8rem; overflow-x: auto }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }} img {{ max-width: 100% }}
td, th {{ border: 1px solid var(--line); padding: .2rem .6rem; text-align: left }}
</style></head><body><nav>{nav}</nav>{body}</body></html>
"""


def pages() -> dict[Path, tuple[str, str]]:
    """Every page with its place in the folder and its name in the navigation: the README, then as INDEX links them."""
    found = {ROOT / "README.md": ("index.html", "st_fast"), INDEX: ("docs.html", "Contents")}
    for name, target in re.findall(r"\[([^\]]+)\]\(([\w./-]+\.md)\)", INDEX.read_text(encoding="utf-8")):
        page = (INDEX.parent / target).resolve()
        place = f"bench-{page.stem}" if page.parent.name == "bench" else page.stem
        found.setdefault(page, (f"{place.lower()}.html", name))
    return found


def build(out: Path) -> None:
    """Writes out/index.html (the README), a page for each guide, and out/api/ for every module."""
    out.mkdir(parents=True, exist_ok=True)
    places = pages()
    for page, (place, name) in places.items():
        links = [f"<b>{n}</b>" if n == name else f'<a href="{p}">{n}</a>' for p, n in places.values()]
        nav = "".join([*links, '<a href="api/st_fast.html">API</a>'])
        text = page.read_text(encoding="utf-8")
        title = escape(re.sub(r"[`*]", "", text.partition("\n")[0].lstrip("# ")))
        body = markdown2.markdown(text, extras=["fenced-code-blocks", "tables", "header-ids", "cuddled-lists"])
        body = _linked(body, page, places, out)
        (out / place).write_text(PAGE.format(title=title, nav=nav, body=body), encoding="utf-8")
    pdoc.render.configure(docformat="markdown", math=False)
    pdoc.pdoc("st_fast", r"!st_fast\._csrc", output_directory=out / "api")


def _linked(body: str, page: Path, places: dict[Path, tuple[str, str]], out: Path) -> str:
    """A page with its links as they are in the folder; files that are no pages are copied to out/files."""

    def link(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        if not path or ":" in path:
            return found[0]
        target = (page.parent / path).resolve()
        place = places[target][0] if target in places else f"files/{target.relative_to(ROOT).as_posix()}"
        if target not in places:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.copytree(target, out / place, dirs_exist_ok=True)
            else:
                shutil.copy(target, out / place)
        return f'{found[1]}="{place}{mark}{anchor}"'

    return re.sub(r'(href|src)="([^"]+)"', link, body)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

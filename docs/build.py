"""Builds the documentation into a folder: the guides beside this file as pages, the docstrings by pdoc.

python docs/build.py build/docs
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from html import escape
from pathlib import Path

import markdown2
import pdoc
import pdoc.render

HERE = Path(__file__).resolve().parent
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif }}
pre, code {{ font-size: .9rem; background: #f4f4f4 }} pre {{ padding: .8rem; overflow-x: auto }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left }}
nav a {{ margin-right: 1rem }} img {{ max-width: 100% }}
</style></head><body><nav>{nav}</nav>{body}</body></html>
"""


def build(out: Path) -> None:
    """Writes out/index.html (the README), a page for each guide, and out/api/ for every module."""
    out.mkdir(parents=True, exist_ok=True)
    guides = {"index": HERE.parent / "README.md"} | {page.stem: page for page in sorted(HERE.glob("*.md"))}
    links = [f'<a href="{name}.html">{name}</a>' for name in guides] + ['<a href="api/st_fast.html">API</a>']
    for name, page in guides.items():
        text = page.read_text(encoding="utf-8")
        title = escape(re.sub(r"[`*]", "", text.partition("\n")[0].lstrip("# ")))
        body = markdown2.markdown(text, extras=["fenced-code-blocks", "tables", "header-ids", "cuddled-lists"])
        (out / f"{name}.html").write_text(
            PAGE.format(title=title, nav="".join(links), body=_moved(body, page, out)), "utf-8"
        )
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, out)
    pdoc.render.configure(docformat="markdown", math=False)
    pdoc.pdoc("st_fast", r"!st_fast\._csrc", output_directory=out / "api")


def _moved(body: str, page: Path, out: Path) -> str:
    """A page's links, from where the page lies in the repository to where it lies among the others."""

    def move(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        target = (page.parent / path).resolve()
        if not path or ":" in path:
            return found[0]
        if target.parent == HERE and target.suffix in (".md", ".png"):
            place = target.name.replace(".md", ".html")
        else:
            place = "index.html" if target == HERE.parent / "README.md" else os.path.relpath(target, out)
        return f'{found[1]}="{place}{mark}{anchor}"'

    return re.sub(r'(href|src)="([^"]+)"', move, body)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

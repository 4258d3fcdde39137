"""Hooks of mkdocs: the README is the first page, and links to files of the repository work.

Documents link to source files, some with a line (`../fastres/model/resnet.py#L82`), as they are
read in a clone. In the site each of those files is a page of its own, its lines the anchors.
https://www.mkdocs.org/user-guide/configuration/#hooks
"""

import inspect
import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

import fastres

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\((?!https?://|mailto:|data:|#)([^)\s#]+)(#[^)\s]*)?\)")
# What the names of `fastres` return.
_RESULTS = (
    "fastres.api.TrainResult",
    "fastres.inference.trained.TrainedNetwork",
    "fastres.inference.prediction.Prediction",
    "fastres.inference.scores.Evaluation",
    "fastres.fusion.explain.Explanation",
    "fastres.data.dataset.Dataset",
    "fastres.data.dataset.ImageSet",
    "fastres.hub.HubNetwork",
)
# Pages that are another file's text.
_HOMES = {"index.md": "README.md", "tour.md": "docs/tour.ipynb"}


def on_files(files: Files, config) -> Files:
    """Add the README, the notebook's text and a page for every linked file of the repository."""
    pages = {"index.md": (ROOT / "README.md").read_text(), "tour.md": _tour(), "api.md": _api()}
    texts = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    texts += pages.items()
    for here, text in texts:
        for target, _ in _LINK.findall(text):
            path = _target(here, target)
            page = _page_of(path)
            if page.startswith("source/") and page not in pages and (ROOT / path).exists():
                pages[page] = _source_page(path)
                if path.endswith(".md"):
                    texts.append((page, pages[page]))
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Point links to files of the repository at their pages."""
    here = page.file.src_uri
    if here.startswith("source/") and not (ROOT / _path_of(here)).exists():  # a page of code
        return markdown

    def changed(found: re.Match[str]) -> str:
        target, anchor = found.groups()
        page_there = _page_of(_target(here, target))
        return f"]({posixpath.relpath(page_there, posixpath.dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(changed, markdown)


def _path_of(page: str) -> str:
    """The file of the repository whose text a page is."""
    if page.startswith("source/"):
        return page.removeprefix("source/")
    return _HOMES.get(page, f"docs/{page}")


def _page_of(path: str) -> str:
    """The page of a file of the repository."""
    for page, home in _HOMES.items():
        if path == home:
            return page
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _target(page: str, target: str) -> str:
    """The file of the repository that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_path_of(page)), target))


def _api() -> str:
    """The names of `fastres` and what they return, from their docstrings."""
    parts = ["# API", "Names of `fastres` itself first; the others are what those return."]
    for name in fastres.__all__:
        # Of a command's module, what calling it does.
        home = "fastres.api" if inspect.ismodule(getattr(fastres, name)) else "fastres"
        parts.append(f"::: {home}.{name}\n    options:\n      heading: fastres.{name}")
    return "\n\n".join(parts + [f"::: {name}" for name in _RESULTS]) + "\n"


def _tour() -> str:
    """The notebook as a page: texts, code, what it printed and drew."""
    parts = []
    for cell in json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="what the cell drew" src="data:image/png;base64,{png}">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _source_page(path: str) -> str:
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if not entry.name.startswith("."))
        return f"# {path}\n\n" + "\n".join(f"- `{name}`" for name in names)
    text = file.read_text()
    if path.endswith(".md"):
        return text
    try:
        lexer = get_lexer_for_filename(file.name, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    code = highlight(text, lexer, HtmlFormatter(linespans="L", wrapcode=True))
    # Lines are named as on GitHub.
    code = code.replace('<span id="L-', '<span id="L')
    return f"# {path}\n\n{code}"

"""The documents: links lead somewhere, commands have the options they show, code blocks run."""

import html.parser
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.__main__ import COMMANDS
from fastres.completion import words_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://|mailto:|data:)([^)\s#]*)(#[^)\s]*)?\)")
COMMAND = re.compile(r"(?:^fastres |-m fastres[. ])(\w+)(?![\w.])([^|>#]*)")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(text):
    """Return the fenced blocks of a document as (language, content)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the commands of fastres in a document's code: (name, the words behind it)."""
    lines = [line.strip() for language, block in blocks(text) if language != "python"
             for line in block.splitlines()]  # fmt: skip
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return [found.groups() for line in lines for found in COMMAND.finditer(line)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_lines(path):
    for target, anchor in LINK.findall(path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor.startswith("#L"):
            assert int(anchor[2:]) <= len(file.read_text().splitlines()), target + anchor


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_have_these_options(path):
    for name, rest in commands(path.read_text()):
        if name.isupper():  # a placeholder
            continue
        assert name in COMMANDS, f"{name} {rest}"
        if COMMANDS[name][0].startswith("fastres.kernels."):
            continue
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest):
            assert option in words_of(name), f"fastres {name} {option}"


def test_commands_are_found():
    text = "`fastres predict RUN --top 3`, `--lr 1`\n```\npython -m fastres.train --fast\n```\n"
    assert commands(text) == [("train", " --fast"), ("predict", " RUN --top 3")]


def test_every_task_has_its_place():
    readme, tasks = (ROOT / "README.md").read_text(), (DOCS / "tasks.md").read_text()
    for name in ("predict", "evaluate", "report", "sweep", "export", "convert", "doctor"):
        assert f"`fastres/{name}.py`" in readme, name
        assert f"\n## {name}\n" in tasks, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_are_python(path):
    for language, block in blocks(path.read_text()):
        if language == "python":
            compile(block, name_of(path), "exec")


def outside(folder):
    """Return the environment of a program that somebody runs in `folder`: not that of kernel tests.

    There Triton's interpreter takes the place of compiled kernels.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return env | {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(folder), "HOME": str(folder)}


def test_the_page_on_python_runs(tmp_path):
    parts = [block for language, block in blocks((DOCS / "python.md").read_text())
             if language == "python"]  # fmt: skip
    assert len(parts) >= 8
    script = tmp_path / "page.py"
    # Loaders may start processes, which import it again.
    lines = "".join(parts).splitlines()
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {x}\n" for x in lines))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=outside(tmp_path), capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[\d.]+ % after [\d.]+ s$", done.stdout, re.MULTILINE), done.stdout
    assert "resnet21" in done.stdout
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert summary["dataset"] == "synthetic"


def printed_and_drawn(cells):
    """Return what each cell printed, and the places, from 1, of those that drew a picture."""
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]
    has_picture = [any("image/png" in o.get("data", {}) for o in cell.outputs) for cell in cells]
    return printed, [place for place, found in enumerate(has_picture, 1) if found]


def test_the_tour_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name, value in outside(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = nbformat.read(DOCS / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    titles = [cell for cell in notebook.cells if re.search("^## ", cell.source, re.MULTILINE)]
    assert len(code) == 10 == len(titles)
    committed = printed_and_drawn(code)
    nbclient.execute(notebook, cwd=str(tmp_path), timeout=900, kernel_name="python3")
    printed, drawn = printed_and_drawn(code)
    assert drawn == [1, 4, 7, 9]
    # Outputs are committed for those who read it; what no machine changes must be up to date.
    assert committed[1] == drawn
    for place in (0, 1, 2, 4, 5):
        assert committed[0][place] == printed[place]
    assert "residual block: output differs from x by 0.0" in printed[2]
    assert "layer1.0.conv1" in printed[4]
    assert float(re.search(r"^([\d.]+) % right, 95 % interval", printed[7])[1]) > 50
    assert "same keys: True" in printed[9]
    assert float(printed[9].split()[-1]) < 0.01
    # For eyes.
    (tmp_path / "tour.ipynb").write_text(nbformat.writes(notebook))


# The site


class Page(html.parser.HTMLParser):
    """Notes the anchors of a page, its links, and what a browser loads with it."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        is_style = tag == "link" and found.get("rel") in ("stylesheet", "icon")
        if url := found.get("href" if is_style else "src"):
            self.loaded.append(url)


def test_the_site_is_whole(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): Page(path.read_text())
        for path in tmp_path.rglob("*.html")
    }
    names = {path.stem for path in DOCS.glob("*.md")} | {"api", "index", "tour"}
    assert {f"{name}.html" for name in names} <= pages.keys()
    assert {"fastres.create_model", "fastres.api.train"} <= pages["api.html"].anchors
    # Lines of source files are anchors.
    assert {"L1", "L10"} <= pages["source/fastres/model/resnet.py.html"].anchors
    for here, page in pages.items():
        if here != "404.html":  # shown at any depth, its links begin at the root of a server
            check_links(here, page, pages, tmp_path)


def check_links(here, page, pages, site):
    for link in page.links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:|//", target):
            continue
        there = here if not target else posixpath.join(posixpath.dirname(here), target)
        there = posixpath.normpath(there)
        assert (site / there).exists(), f"{here}: {link}"
        # Those of Material itself, such as the top of a page, begin otherwise.
        if anchor and there in pages and not anchor.startswith("__"):
            assert anchor in pages[there].anchors, f"{here}: {link}"
    for url in page.loaded:
        assert not re.match(r"https?:|//", url), f"{here} loads {url}"
        if not url.startswith("data:"):
            file = site / posixpath.dirname(here) / url.partition("?")[0]
            assert file.exists(), f"{here} loads {url}"

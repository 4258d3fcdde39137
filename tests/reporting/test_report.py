"""The report: one whole file without a network, escaped; opened in a browser where one is."""

import html.parser
import os
import re
import shutil
import subprocess
from html import escape
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres import report
from fastres.reporting.figures import grid_of, line_chart
from fastres.reporting.layers import feature_maps, first_filters, layer_costs
from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY_NET, run_train

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    data = image_folder(
        tmp_path_factory.mktemp("data") / "mine", ("cat", "<b>dog</b>".replace("/", "_"), "eel"), 12
    )
    folder = tmp_path_factory.mktemp("runs")
    words = (*TINY_NET, "--batch-size", "10", "--epochs", "2", "--data-dir", data)
    for name, lr in (("slow", "0.01"), ("quick", "0.2")):
        assert run_train(*words, "--lr", lr, "--out", folder / name) == 0
    return [str(folder / name) for name in ("slow", "quick")]


class Checked(html.parser.HTMLParser):
    """Notes tags that are not closed, and everything that a browser would fetch."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith(("data:", "#")):
                self.fetched.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(path):
    parser = Checked()
    parser.feed(path.read_text())
    assert parser.open == []
    assert parser.fetched == []
    assert "script" not in parser.tags
    return path.read_text()


@pytest.mark.parametrize("inside", ["first", "all", "none"])
def test_a_report_is_whole(inside, runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert report.main([*runs, "--out", str(out), "--inside", inside]) == 0
    text = checked(out)
    for title in ("Results", "Curves", "Options that differ", "Origins"):
        assert f"<h2>{title}" in text
    count = {"first": 1, "all": 2, "none": 0}[inside]
    for title in ("Test images", "First filters", "Feature maps", "Layers"):
        assert text.count(f"<h2>{title}") == count
    assert "<td>lr</td>" in text
    assert "url(" not in re.sub(r"url\(#", "", text)


def test_names_are_escaped(runs, tmp_path):
    out = tmp_path / "report.html"
    assert report.main([runs[0], "--out", str(out)]) == 0
    text = checked(out)
    assert "&lt;b&gt;dog" in text
    assert "<b>" not in text


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(runs, tmp_path, capsys):
    run = shutil.copytree(runs[0], tmp_path / "unfinished")
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    out = tmp_path / "report.html"
    assert report.main([str(run), runs[1], "--out", str(out)]) == 0
    text = checked(out)
    assert "not finished: unfinished" in text
    assert "<h2>First filters" in text
    (run / "last.safetensors").unlink()
    assert report.main([str(run), runs[1], "--out", str(out), "--overwrite"]) == 0
    assert "<h2>First filters" not in checked(out)
    assert "unfinished: no checkpoint yet" in capsys.readouterr().out


def test_an_image_of_mine_is_looked_at(runs, tmp_path):
    image = tmp_path / "my <cat>.png"
    Image.fromarray(np.full((50, 70, 3), 255, np.uint8)).save(image)
    out = tmp_path / "report.html"
    assert report.main([runs[0], "--out", str(out), "--image", str(image)]) == 0
    text = checked(out)
    assert "my &lt;cat&gt;.png; of each part" in text
    assert text.count('alt="feature maps behind') == 4


def test_names_of_runs_may_hold_anything(runs, tmp_path):
    names = ("_under$score$", "<i>강아지 & co")
    copies = [str(shutil.copytree(runs[0], tmp_path / name)) for name in names]
    out = tmp_path / "report.html"
    assert report.main([*copies, "--out", str(out), "--inside", "none"]) == 0
    text = checked(out)
    assert "</i> _under$score$: test</span>" in text
    assert "</i> &lt;i&gt;강아지 &amp; co: train</span>" in text


def test_numbers_have_their_origin(runs, tmp_path):
    out = tmp_path / "report.html"
    assert report.main([runs[0], "--out", str(out), "--inside", "none"]) == 0
    origins = checked(out).partition("<h2>Origins")[2]
    assert "slow: <code>python -m fastres.train" in origins
    assert f"torch {version('torch')}" in origins
    assert "commit " in origins


def test_without_test_images_it_says_why(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "moved")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(re.sub(r'"data_dir": ".*?"', '"data_dir": "/gone"', config))
    out = tmp_path / "report.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    text = checked(out)
    assert "Not evaluated: the data folder /gone does not exist" in text
    assert "<h2>Layers" in text
    # One that was asked for is an error.
    words = [str(run), "--out", str(out), "--overwrite", "--data-dir", "/away"]
    assert report.main(words) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "is no run folder"),
        (["R", "--out", "F"], "is there already"),
        (["R", "--out", "D"], "is a folder"),
        (["R", "R"], "the same run is named twice"),
        (["R", "--out", "none/F"], "there is no folder none"),
        (["R", "--image", "F", "--inside", "none"], "leave out --inside none"),
    ],
)
def test_wrong_use_is_one_sentence(words, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text("mine")
    (tmp_path / "D").mkdir()
    assert report.main([runs[0] if word == "R" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("row", ["[1]", '{"epoch": "one"}', "7"])
def test_rows_that_no_run_writes_are_refused(row, runs, tmp_path, capsys):
    run = shutil.copytree(runs[0], tmp_path / "odd")
    (run / "metrics.jsonl").write_text(row + "\n")
    assert report.main([str(run), "--out", str(tmp_path / "report.html")]) == 1
    assert "metrics.jsonl holds a row that is no numbers" in capsys.readouterr().err


def test_layers_are_measured():
    model = fastres.create_model("resnet20", 10, seed=0).eval()
    costs = layer_costs(model, batch_size=2)
    assert [cost.name for cost in costs[:2]] == ["conv1", "bn1"]
    assert sum(cost.mflop for cost in costs) == pytest.approx(81.7, abs=1)
    first = costs[0]
    assert first.bytes == 4 * (3 * 1024 + 16 * 1024 + 432 / 2)
    assert all(cost.microseconds > 0 for cost in costs)
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_and_filters_are_pictures():
    model = fastres.create_model("resnet8", 10, seed=0).eval()
    assert first_filters(model).shape == (16, 3, 3, 3)
    maps = feature_maps(model, torch.randn(3, 32, 32))
    assert [(part.name, part.maps.shape) for part in maps] == [
        ("stem", (16, 32, 32)), ("layer1", (16, 32, 32)),
        ("layer2", (32, 16, 16)), ("layer3", (32, 8, 8)),
    ]  # fmt: skip


def test_a_grid_has_transparent_gaps():
    grid = grid_of(np.full((3, 2, 2), 7, np.uint8), columns=2, zoom=2)
    assert grid.shape == (10, 10, 4)
    assert grid[0, 0].tolist() == [7, 7, 7, 255]
    assert grid[4, 0].tolist() == [0, 0, 0, 0]
    assert grid[9, 9].tolist() == [0, 0, 0, 0]


def test_charts_follow_the_colours_of_the_page():
    chart = line_chart({"a": ([1, 2], [3, 4])}, title="t", x="x", y="y")
    assert chart.startswith("<figure><svg")
    assert "fill: currentColor" in chart
    assert "#010203" not in chart
    assert "figcaption" not in chart
    # Ids that two charts would share are of what they share alone: clips and markers.
    assert not re.search(r' id="[^"]*_\d+"', chart)


def test_a_dashed_line_has_the_colour_of_the_one_before():
    lines = {name: ([1, 2], [3, 4]) for name in ("a test", "a train", "b test")}
    chart = line_chart(lines, title="t", x="x", y="y", dashed=["a train"])
    keys = re.findall(r"border-top: 3px (\w+) (#\w+)", chart)
    assert [style for style, _ in keys] == ["solid", "dashed", "solid"]
    assert keys[0][1] == keys[1][1] != keys[2][1]


# In a browser


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([*runs, "--out", str(out)]) == 0
    return out.read_text()


def browse(file, folder, *words):
    """Open a file in headless Chromium and return what it prints."""
    start = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *start, profile, *words, file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# A window may not be as narrow as a phone; a frame may. It notes how wide the page inside is.
FRAME = """<!doctype html><body style="margin: 0">
<iframe style="border: 0" width="{width}" height="8000" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument.documentElement
  document.body.dataset.size = `${{inside.scrollWidth}} ${{inside.offsetHeight}}`
}})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_a_browser_shows_it(width, dark, page, tmp_path):
    if dark:
        assert "(prefers-color-scheme: dark)" in page
        page = page.replace("(prefers-color-scheme: dark)", "all")
    file, picture = tmp_path / "frame.html", tmp_path / "report.png"
    file.write_text(FRAME.format(width=width, page=escape(page)))
    found = re.search(r'data-size="(\d+) (\d+)"', browse(file, tmp_path, "--dump-dom"))
    # Nothing but tables is scrolled sideways, and those inside themselves.
    assert int(found[1]) == width
    height = int(found[2])
    assert height > 1500
    window = f"--window-size={max(width, 800)},8000"
    browse(file, tmp_path, window, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("L"))[: min(height, 7800), :width]
    assert pixels.shape[1] == width
    # Paper at the edge, and something drawn on it in every part.
    assert (pixels[:, 2] < 60).all() if dark else (pixels[:, 2] > 200).all()
    assert all(np.ptp(part) > 60 for part in np.array_split(pixels, len(pixels) // 300))

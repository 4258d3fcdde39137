"""A study of depth: to rows and back, its tables and picture, and the lines its text quotes."""

import json
import re

import pytest

from benchmarks.harness.rows import read_results
from benchmarks.report import collect, documents, plots
from benchmarks.report.architecture import relink
from benchmarks.report.depth import lines_of_rows, rows_of_study
from fastres.studies.picture import lines_of
from tests.benchmarks.test_results import PROVENANCE, RUN

DOCS = documents.ROOT / "docs"
TEXTS = ("why-residual.md", "why-residual.ko.md")


def net(kind, depth, seed=0):
    """A record of two epochs; seeds differ in their errors by one percent."""
    rows = [
        {
            "epoch": float(epoch),
            "train_accuracy": 50.0 + 10 * epoch - seed,
            "test_accuracy": 45.0 + 10 * epoch - seed,
            "first_layer_gradient": depth / 10 + epoch,
        }
        for epoch in (1, 2)
    ]
    shares = range(1, depth // 2) if kind == "residual" else ()
    return {
        "kind": kind,
        "depth": depth,
        "seed": seed,
        "first_layer_parameters": 432,
        "first_layer_norm": 3.0,
        "gradient_at_start": depth / 10,
        "rows": rows,
        "layers": [{"layer": f"bn{i}", "std": i / depth} for i in range(1, depth)],
        "blocks": [
            {"block": f"layer{i}", "residual_rms": i / 8, "shortcut_rms": 2.0} for i in shares
        ],
        "summary": RUN,
    }


@pytest.fixture(scope="module")
def nets():
    return [net(kind, depth) for depth in (8, 20) for kind in ("plain", "residual")]


def test_rows_hold_all_that_is_drawn(nets):
    assert lines_of_rows(rows_of_study(nets)) == [lines_of(record) for record in nets]


def test_seeds_become_one_row():
    rows = rows_of_study([net("plain", 8, seed) for seed in (0, 1, 2)])
    (row,) = [row for row in rows if (row.suite, row.metric) == ("degradation", "train_error")]
    assert (row.n, row.low, row.median, row.high) == (3, 30, 31, 32)
    assert row.case == "d 100 w1 2 epochs batch 10, 8 layers"


def test_a_block_without_an_input_has_no_share(nets):
    dead = nets[1] | {"blocks": [{"block": "b", "residual_rms": 1.0, "shortcut_rms": 0.0}]}
    assert lines_of(dead).shares == [None]
    assert not [row for row in rows_of_study([dead]) if row.metric == "residual_share"]


def test_a_study_becomes_tables_and_a_picture(nets, tmp_path, monkeypatch):
    study = {"options": {}, "provenance": PROVENANCE, "nets": nets}
    (tmp_path / "results.json").write_text(json.dumps(study))
    written = collect.write_results
    monkeypatch.setattr(collect, "write_results", lambda *of: written(*of, tmp_path))
    assert collect.main(["study", str(tmp_path)]) == 0
    results = read_results(tmp_path)
    block = "<!-- results: degradation | across: gradient_at_end -->\n<!-- end -->"
    text = documents.fill(block, results)
    assert "| plain | residual |" in text
    assert "20 layers | 4 | 4 |" in text
    (picture,) = [p for p in plots.pictures(results) if p.kind == "degradation"]
    assert len(picture.rows) == len(rows_of_study(nets))
    svg = picture.svg().decode()
    for kind, depth in (("plain", 8), ("residual", 20)):
        # A letter is a use of its glyph; the comment above says what is written.
        assert f"<!-- {kind} {depth}: 30.0 | 35.0 % -->" in svg


def test_both_languages_say_the_same_of_the_same_lines():
    english, korean = ((DOCS / name).read_text() for name in TEXTS)
    for pattern in (r"\[`[^`]+`\]\([^)]+\)", r"<!-- .* -->", r"^#+ ", r"https://\S+?(?=\))"):
        found = re.findall(pattern, english, re.MULTILINE)
        assert found
        assert re.findall(pattern, korean, re.MULTILINE) == found
    readme = (documents.ROOT / "README.md").read_text()
    assert all(f"(docs/{name})" in readme for name in TEXTS)
    assert all(DOCS / name in documents.DOCUMENTS for name in TEXTS)


def test_a_quotation_follows_its_line_and_must_be_one(tmp_path):
    (tmp_path / "net.py").write_text("a = 1\nb = 2\n    a = 1\n")
    assert relink("[`b = 2`](net.py#L9)", tmp_path) == "[`b = 2`](net.py#L2)"
    assert relink("[`a = 1`](net.py#L4)", tmp_path) == "[`a = 1`](net.py#L3)"
    assert relink("[net](net.py) and `a = 1`", tmp_path) == "[net](net.py) and `a = 1`"
    with pytest.raises(ValueError, match=r"`a = 2` is no line of net\.py"):
        relink("[`a = 2`](net.py#L1)", tmp_path)
    # What `python -m benchmarks.report --check` finds in the documents.
    for name in TEXTS:
        text = (DOCS / name).read_text()
        assert relink(text, DOCS) == text
        assert text.count(".py#L") >= 12

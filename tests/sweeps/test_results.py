"""What a sweep says of its settings."""

import dataclasses
import io
import statistics
import sys

import pytest
from rich.console import Console

from fastres.sweeps.results import RunRow, datasets_of, draw, setting_rows, table_of


def rows(setting, values, val=None, dataset="synthetic"):
    return [
        RunRow(setting, seed, dataset, value, val, 2.0 + seed, "x")
        for seed, value in enumerate(values)
    ]


def test_rows_against_scipys_own_numbers():
    stats = pytest.importorskip("scipy.stats")
    a, b, c = [90.1, 90.4, 89.9], [91.0, 91.3, 91.1], [90.2, 90.3, 90.1]
    found = setting_rows(rows("a", a) + rows("b", b) + rows("c", c), "test_accuracy", "a")
    assert [(row.setting, row.n, row.seconds) for row in found] == [(s, 3, 3.0) for s in "abc"]
    assert found[0].mean == pytest.approx(statistics.mean(a))
    half = stats.t.ppf(0.975, 2) * statistics.stdev(a) / 3**0.5
    assert found[0].high - found[0].mean == pytest.approx(half)
    assert found[0].mean - found[0].low == pytest.approx(half)
    smaller = stats.ttest_ind(b, a, equal_var=False).pvalue
    larger = stats.ttest_ind(c, a, equal_var=False).pvalue
    assert smaller < larger
    assert found[1].p == pytest.approx(2 * smaller)
    assert found[2].p == pytest.approx(max(2 * smaller, larger))
    assert (found[1].larger, found[2].larger) == (True, False)
    assert found[1].difference == pytest.approx(statistics.mean(b) - statistics.mean(a))
    assert (found[0].difference, found[0].p) == (None, None)
    assert table_of(found, "test_accuracy").row_count == 3


def test_a_narrow_terminal_loses_nothing():
    pytest.importorskip("scipy")
    long = "lr=0.1, model=resnet20, weight_decay=0.0005"
    found = setting_rows(
        rows("b", [91.0, 91.3, 91.1]) + rows(long, [90.1, 90.4, 89.9]), "test_accuracy", "b"
    )
    console = Console(width=80, file=io.StringIO())
    console.print(table_of(found, "test_accuracy"))
    lines = console.file.getvalue().splitlines()
    assert not any("…" in line for line in lines)
    width = lines[0].index(" n ")
    folded = "".join(line[:width].strip() for line in lines[2:] if line.startswith(" "))
    assert folded.replace(" ", "").startswith(long.replace(" ", ""))
    assert "larger" in lines[2]


def test_the_reference_is_the_one_that_is_named():
    a, b = rows("a", [90.0, 91.0]), rows("b", [92.0, 93.0])
    found = setting_rows(a + b, "test_accuracy", "b")
    assert [row.difference for row in found] == [-2.0, None]
    # None of its runs has ended.
    assert [row.difference for row in setting_rows(a + b, "test_accuracy", "c")] == [None, None]
    assert [row.p for row in setting_rows(a + b, "test_accuracy", None)] == [None, None]


def test_one_run_has_no_spread():
    found = setting_rows(rows("a", [90.0]) + rows("b", [91.0]), "test_accuracy", "a")
    assert all(row.sd is None and row.low is None and row.p is None for row in found)
    assert found[1].larger is None
    assert found[1].difference == 1.0


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_equal_accuracies():
    pytest.importorskip("scipy.stats")
    same, other, spread = [90.1] * 3, [91.1] * 3, [91.0, 91.3, 91.1]
    runs = rows("a", same) + rows("b", other) + rows("c", spread)
    found = setting_rows(runs, "test_accuracy", "a")
    # Two spreads of zero say nothing of chance, and one comparison is left to correct for.
    assert (found[1].p, found[1].larger) == (None, None)
    assert found[0].sd == 0
    assert 0 < found[2].p < 0.05


def test_runs_without_validation_images_do_not_count_there():
    runs = rows("a", [90.0]) + rows("a", [91.0], val=80.0)
    [row] = setting_rows(runs, "val_accuracy", "a")
    assert (row.n, row.mean) == (1, 80.0)
    assert setting_rows(rows("a", [90.0]), "val_accuracy", "a") == []


def test_without_scipy_there_is_no_interval(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    found = setting_rows(rows("a", [90.0, 91.0]) + rows("b", [92.0, 93.0]), "test_accuracy", "a")
    assert all(row.low is None and row.p is None for row in found)
    assert found[1].difference == 2.0


def test_every_dataset_is_named():
    runs = rows("a", [90.0], dataset="cifar10") + rows("a", [91.0])
    assert datasets_of(runs) == "cifar10 and synthetic"
    assert setting_rows(runs, "test_accuracy", None)[0].dataset == "cifar10 and synthetic"


def test_a_picture_of_one_run_and_of_many_settings():
    one = rows("a", [90.0])
    assert draw(one, setting_rows(one, "test_accuracy", "a"), "test_accuracy", "t")[1:4] == b"PNG"
    row = setting_rows(one, "test_accuracy", "a")[0]
    many = [dataclasses.replace(row, setting=str(number)) for number in range(30)]
    assert draw(one, many, "test_accuracy", "t")[1:4] == b"PNG"

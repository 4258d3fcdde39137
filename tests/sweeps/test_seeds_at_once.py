"""The measurement of several seeds on one GPU, in its form without one."""

import pytest

from benchmarks.harness.rows import read_results
from benchmarks.prove import seeds_at_once


def test_both_ways_become_rows(tmp_path, capsys):
    words = ["--model", "resnet8", "--batch-size", "10", "--limit-train", "60", "--counts", "2"]
    words += ["--rounds", "1", "--seconds", "0.3", "--out", str(tmp_path)]
    assert seeds_at_once.main(words) == 0
    rows = [row for row, _ in read_results(tmp_path)]
    assert [row.provider for row in rows] == ["processes", "streams"]
    assert all(row.median > 0 and row.case.endswith("2 at once") for row in rows)


@pytest.mark.parametrize("words", [["--counts", "0"], ["--rounds", "0"]])
def test_wrong_use_is_one_sentence(words, capsys):
    assert seeds_at_once.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1

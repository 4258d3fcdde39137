"""Results: one schema, append-only, and no table in the documents that the rows do not make."""

import json

import pytest

from benchmarks import collect, report
from benchmarks.rows import RESULTS, Row, read_results, summarize, write_results

CERTIFICATE = {
    "machine": {"gpu": None, "cpu": "Some (R) CPU", "cores": 2, "cpu_vectors": "avx2"},
    "versions": {"torch": "2.11.0"},
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m x",
    "dtype": "fp32",
}
RUN = {
    "dataset": "d",
    "train_images": 100,
    "model": "resnet20",
    "width": 1.0,
    "recipe": "quick",
    "epochs": 2.0,
    "batch_size": 10,
    "route": "eager",
    "precision": "fp32",
    "channels_last": False,
    "loader": "torch",
    "test_loss": 1.0,
    "train_seconds": 5.0,
    "images_per_second": 40.0,
    "dataset_fingerprint": "f",
    **CERTIFICATE,
}


def test_results_come_back_and_are_never_overwritten(tmp_path):
    row = summarize("train", "case", "eager", "seconds", "s", [3.0, 1.0, 2.0])
    assert (row.n, row.median, row.low, row.high) == (3, 2.0, 1.0, 3.0)
    path = write_results("train", [row], CERTIFICATE, tmp_path)
    assert path.name == "train_some-r-cpu-2-cores_fp32_torch2.11.0_2026-01-02.csv"
    assert read_results(tmp_path) == [(row, CERTIFICATE)]
    with pytest.raises(FileExistsError):
        write_results("train", [row], CERTIFICATE, tmp_path)


def test_runs_that_differ_in_seed_alone_become_one_row(tmp_path):
    runs = [RUN | {"seed": seed, "test_accuracy": 80.0 + seed} for seed in range(3)]
    rows = {row.metric: row for row in collect.rows_of(runs)}
    assert rows["test_accuracy"].n == 3
    assert rows["test_accuracy"].median == 81.0
    other = [*runs, RUN | {"seed": 0, "test_accuracy": 80.0, "channels_last": True}]
    assert {row.provider for row in collect.rows_of(other)} == {
        "eager fp32 nchw torch",
        "eager fp32 channels_last torch",
    }


def test_runs_of_different_commits_are_not_mixed(tmp_path, capsys):
    for number, commit in enumerate(("a", "b")):
        (tmp_path / str(number)).mkdir()
        summary = RUN | {"seed": number, "test_accuracy": 80.0, "commit": commit}
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(summary))
    assert collect.main(["runs", "x", str(tmp_path / "0"), str(tmp_path / "1")]) == 2
    assert "differ in their commit" in capsys.readouterr().err


def test_a_benchmark_report_becomes_rows():
    seconds = [0.5, 0.25, 0.4]
    benchmark = {
        "group": "loaders alone",
        "params": {"provider": "dali"},
        "extra_info": {"images": 100},
        "stats": {"data": seconds},
    }
    (row,) = collect.rows_of_benchmarks({"benchmarks": [benchmark]}, "real images")
    assert (row.suite, row.provider, row.n) == ("loaders", "dali", 3)
    assert (row.median, row.low, row.high) == (250, 200, 400)


def test_a_table_holds_every_row_of_its_suite():
    rows = [
        (Row("train", "c", "eager", "test_accuracy", "%", 1, 90.5, 90.5, 90.5), CERTIFICATE),
        (Row("train", "c", "eager", "speed", "images/s", 3, 12345.6, 12000, 13000), CERTIFICATE),
        (Row("loaders", "c", "dali", "speed", "images/s", 1, 7, 7, 7), CERTIFICATE),
    ]
    text = report.fill("a\n<!-- results: train -->\nold\n<!-- end -->\nb\n", rows)
    assert "90.5 %" in text
    assert "12,346 images/s (12,000 to 13,000, n = 3)" in text
    assert "old" not in text
    assert "dali" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")


def test_every_result_has_its_certificate():
    for path in RESULTS.glob("*.csv"):
        certificate = json.loads(path.with_suffix(".json").read_text())
        assert certificate.keys() >= {"machine", "versions", "commit", "date", "command", "dtype"}
    for row, _ in read_results():
        assert row.low <= row.median <= row.high
        assert row.n >= 1


def test_the_documents_agree_with_the_rows(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out

"""Results: one schema, append-only, and no table in the documents that the rows do not make."""

import json
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.harness.rows import (
    RESULTS,
    Row,
    make_provenance,
    read_results,
    summarize,
    write_results,
)
from benchmarks.report import codegen, collect, plots, tables
from benchmarks.report import documents as report
from fastres import host
from fastres.config import Config
from fastres.engine import machine
from fastres.recipes import from_recipe

PROVENANCE = {
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
    "evaluation_images_per_second": 160.0,
    "peak_memory_mib": 900.0,
    "dataset_fingerprint": "f",
    **PROVENANCE,
}


def test_results_come_back_and_are_never_overwritten(tmp_path):
    row = summarize("train", "case", "eager", "seconds", "s", [3.0, 1.0, 2.0])
    assert (row.n, row.median, row.low, row.high) == (3, 2.0, 1.0, 3.0)
    path = write_results("train", [row], PROVENANCE, tmp_path)
    assert path.name == "train_some-r-cpu-2-cores_fp32_torch2.11.0_2026-01-02.csv"
    assert read_results(tmp_path) == [(row, PROVENANCE)]
    content = path.read_bytes()
    again = write_results("train", [row], PROVENANCE, tmp_path)
    assert again.name == path.name.replace(".csv", "-2.csv")
    assert path.read_bytes() == content
    assert len(read_results(tmp_path)) == 2


def test_runs_that_differ_in_seed_alone_become_one_row(tmp_path):
    runs = [RUN | {"seed": seed, "test_accuracy": 80.0 + seed} for seed in range(3)]
    rows = {row.metric: row for row in collect.rows_of(runs)}
    assert rows["test_accuracy"].n == 3
    assert rows["test_accuracy"].median == 81.0
    of_all = rows["test_accuracy_mean"], rows["test_accuracy_sd"]
    assert [(row.median, row.n) for row in of_all] == [(81, 3), (1, 3)]
    with pytest.raises(ValueError, match="two runs of one seed: d 100 resnet20 w1 quick"):
        collect.rows_of([*runs, runs[0]])
    changed = collect.rows_of(runs, ["", "lr=0.5", "lr=0.5"])
    assert {
        (row.case.partition(", ")[2], row.n) for row in changed if row.metric == "test_loss"
    } == {
        ("", 1),
        ("lr=0.5", 2),
    }
    other = [*runs, RUN | {"seed": 0, "test_accuracy": 80.0, "channels_last": True}]
    assert {row.provider for row in collect.rows_of(other)} == {
        "eager fp32 nchw torch",
        "eager fp32 channels_last torch",
    }


def test_a_run_is_told_apart_by_what_it_changed_of_its_recipe():
    config = from_recipe("paper", "resnet56")
    told = config.replace(seed=3, epochs=5.0, fast=True, width=0.5, dataset="synthetic")
    assert collect._changes(config) == collect._changes(told) == ""
    assert collect._changes(config.replace(val=True, lr=0.2)) == "val=True, lr=0.2"
    assert collect._changes(Config(recipe="mine.toml", lr=0.2)) == "lr=0.2"


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setenv("FASTRES_COMMIT", "0123456789ab")
    assert make_provenance("bf16", ["python", "-m", "x"])["commit"] == "0123456789ab"
    monkeypatch.delenv("FASTRES_COMMIT")
    assert host.commit() is None


def test_runs_of_different_commits_are_not_mixed(tmp_path, capsys):
    for number, commit in enumerate(("a", "b")):
        (tmp_path / str(number)).mkdir()
        summary = RUN | {"seed": number, "test_accuracy": 80.0, "commit": commit}
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(summary))
    assert collect.main(["runs", "x", str(tmp_path / "0"), str(tmp_path / "1")]) == 2
    assert "differ in their commit" in capsys.readouterr().err


def test_a_benchmark_report_becomes_rows(tmp_path):
    info = {"suite": "step", "case": "c", "provider": "fast", "dtype": "float32", "clock": "wall"}
    benchmark = {
        "extra_info": info | {"images": 100, "bytes": 2e9, "flops": 4e9, "peak_bytes": 2**21},
        "stats": {"data": [0.5, 0.25, 0.4]},
    }
    report_ = {"benchmarks": [benchmark], "provenance": PROVENANCE, "datetime": "2026-02-03"}
    found, provenance = collect.rows_of_report(report_, tmp_path)
    rows = {row.metric: row for row in found}
    rate = rows["images_per_second"]
    assert (rate.suite, rate.provider, rate.unit, rate.n) == ("step", "fast", "images/s", 3)
    assert (rate.median, rate.low, rate.high) == (250, 200, 400)
    assert rows["bandwidth"].median == 5
    assert rows["arithmetic"].median == 10
    assert rows["peak_memory"].median == 2
    assert "roofline_share" not in rows
    assert (provenance["dtype"], provenance["date"]) == ("fp32", "2026-02-03")
    # With this machine's peak_rates known, 2 GB at 10 GB/s are a floor of 0.2 s.
    peak_rates = [
        Row("ceilings", "copy, large", "torch", "bandwidth", "GB/s", 1, 10, 10, 10),
        Row("ceilings", "matrix product, fp32", "torch", "arithmetic", "GFLOP/s", 1, 40, 40, 40),
    ]
    write_results("roofline", peak_rates, PROVENANCE, tmp_path)
    found, _ = collect.rows_of_report(report_, tmp_path)
    assert next(row for row in found if row.metric == "roofline_share").median == 50


def test_a_table_holds_every_row_of_its_suite():
    rows = [
        (Row("train", "c", "eager", "test_accuracy", "%", 1, 90.5, 90.5, 90.5), PROVENANCE),
        (Row("train", "c", "eager", "speed", "images/s", 3, 12345.6, 12000, 13000), PROVENANCE),
        (Row("loaders", "c", "dali", "speed", "images/s", 1, 7, 7, 7), PROVENANCE),
    ]
    text = report.fill("a\n<!-- results: train -->\nold\n<!-- end -->\nb\n", rows)
    assert "| how | test accuracy, % | speed, images/s | n |" in text
    assert "| eager | 90.5 | 12,346 (12,000 to 13,000) | 3 |" in text
    assert "old" not in text
    assert "dali" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")


def test_the_papers_errors_stand_beside_runs_of_its_length_alone():
    def accuracy(case, *values):
        return summarize("train", case, "fused", "test_accuracy", "%", values), PROVENANCE

    page = "<!-- published: paper -->\n<!-- end -->"
    runs = [
        accuracy("cifar10 50000 resnet20 w1 paper 164.103 epochs batch 128", 91.0, 91.5, 91.75),
        accuracy("cifar10-jpeg 45000 resnet32 w1 paper 182.336 epochs batch 128", 92.0),
        # Shorter, of the epochs that come closest, narrower, of another batch, of other images.
        accuracy("cifar10 50000 resnet44 w1 paper 2 epochs batch 128", 60.0),
        accuracy("cifar10 50000 resnet44 w1 paper 164 epochs batch 128", 60.0),
        accuracy("cifar10 50000 resnet44 w0.5 paper 164.103 epochs batch 128", 60.0),
        accuracy("cifar10 50000 resnet44 w1 paper 164.103 epochs batch 64", 60.0),
        accuracy("cifar100 50000 resnet44 w1 paper 164.103 epochs batch 128", 60.0),
    ]
    case = "cpu resnet20 batch 128, cifar10-jpeg"
    rate = Row(
        "ladder", case, "fast", "images_per_second", "images/s", 9, *[64_000 * 128 / 7200] * 3
    )
    text = report.fill(page, [*runs, (rate, PROVENANCE)])
    where = "2 cores Some (R) CPU, avx2"
    assert f"hours on {where} (ESTIMATE)" in text
    of_20, of_32, of_44, _, of_110 = (line for line in text.splitlines() if "| resnet" in line)
    assert f"| 8.75 | 8.50 (8.25 to 9.00), n 3: cifar10 50000, fused, {where} | 2 | `" in of_20
    assert "| 7.51 | 8.00, n 1: cifar10-jpeg 45000, fused" in of_32
    assert "| 7.17 | not run here |" in of_44
    assert "| 6.43 (6.61 +- 0.16) | not run here | 12." in of_110
    assert "ESTIMATE" not in report.fill(page, runs)
    with pytest.raises(ValueError, match="there is only paper"):
        report.fill(page.replace("paper", "more"), [])


def speed(provider, value, suite="step", case="resnet20 batch 8"):
    return Row(suite, case, provider, "images_per_second", "images/s", 3, value, value, value)


def born(date="2026-01-02", **machine):
    return PROVENANCE | {"machine": PROVENANCE["machine"] | machine, "date": f"{date}T00:00:00"}


def test_a_table_is_for_one_machine_and_shows_the_newest_rows():
    first, second, other = born(), born("2026-01-03"), born(gpu="NVIDIA H200")
    results = [
        (speed("eager", 100), first),
        (speed("fast", 250), first),
        (speed("eager", 7000), other),
        (speed("fast", 400), second),
    ]
    text = tables.table(tables.choose(results, "step"))
    cpu, gpu = text.split("**NVIDIA H200**")
    assert cpu.startswith("**2 cores Some (R) CPU, avx2**")
    assert "7,000" in gpu
    assert "7,000" not in cpu
    assert "250" not in cpu
    assert "| 400 |" in cpu
    assert "torch 2.11.0, 2026-01-02; torch 2.11.0, 2026-01-03" in cpu


def test_only_what_one_run_measured_is_compared():
    first, second = born(), born("2026-01-03")
    results = [(speed("eager", 100), first), (speed("fast", 250), first)]
    assert "| 2.50 x eager |" in tables.table(tables.choose(results, "step"))
    results.append((speed("fast", 400), second))
    assert " x eager" not in tables.table(tables.choose(results, "step"))
    # A time is better when it is less; the peer comes before eager as the baseline.
    seconds = [("peer_fp32", 8.0), ("eager", 4.0), ("fast", 2.0)]
    results = [(Row("ladder", "c", p, "time", "ms", 1, t, t, t), first) for p, t in seconds]
    text = tables.table(tables.choose(results, "ladder"))
    assert "| 4.00 x peer_fp32 |" in text
    assert "| 2.00 x peer_fp32 |" in text
    # Percents and bytes have no ratio.
    results = [(Row("s", "c", p, "memory", "MiB", 1, 1, 1, 1), first) for p in ("eager", "fast")]
    assert " x " not in tables.table(tables.choose(results, "s"))


def rows_of_info(times, **info):
    known = {"suite": "start-up", "case": "c", "provider": "p", "dtype": "any", "clock": "wall"}
    benchmark = {"extra_info": known | info, "stats": {"data": times}}
    report = {"benchmarks": [benchmark], "provenance": dict(PROVENANCE), "datetime": "2026-01-02"}
    return {row.metric: row for row in collect.rows_of_report(report)[0]}


def test_whole_runs_have_mean_and_deviation_and_what_else_they_measured():
    rows = rows_of_info([1.0, 2.0, 6.0], suite="accuracy", test_accuracy=[], train_seconds=[])
    assert (rows["seconds"].median, rows["seconds_mean"].median) == (2, 3)
    assert rows["seconds_sd"].median == pytest.approx(7**0.5, rel=1e-5)
    assert {row.n for row in rows.values()} == {3}
    rows = rows_of_info([4.0, 8.0], provider="first_step_fast", baseline_seconds=2.0)
    assert (rows["import_share"].low, rows["import_share"].high) == (25, 50)
    run = {"images": 100, "evaluation_rates": [100.0, 150.0], "resident_bytes": 2**30}
    rows = rows_of_info([4.0, 2.0], suite="whole run", **run)
    assert (rows["images_per_second"].low, rows["images_per_second"].high) == (25, 50)
    ratio = rows["evaluation_over_training"]
    assert (ratio.low, ratio.high, ratio.unit) == (3, 4, "x")
    assert rows["resident_memory"].median == 1024


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON"])
def test_what_is_no_report_is_refused(tmp_path, capsys, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    assert collect.main(["benchmarks", "x", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert codegen.main(["collect", str(path)]) == 2
    assert f"error: {path}: " in capsys.readouterr().err


def test_the_rows_of_a_proof_are_taken_over(tmp_path, monkeypatch, capsys):
    proof, results = tmp_path / "proof", tmp_path / "results"
    proof.mkdir(), results.mkdir()
    monkeypatch.setattr(collect, "write_results", partial(write_results, folder=results))
    assert collect.main(["proof", str(proof)]) == 2
    assert f"{proof} is no folder with rows" in capsys.readouterr().err
    path = write_results("bench_step", [speed("eager", 1)], born(), proof)
    for _ in range(2):
        assert collect.main(["proof", str(proof)]) == 0
    names = [path.name, path.name.replace(".csv", "-2.csv")]
    assert sorted(found.name for found in results.glob("*.csv")) == sorted(names)
    assert read_results(results) == read_results(proof) * 2


def test_ratios_to_several_providers_have_a_column_each():
    provenance = born()
    results = [(speed(p, v), provenance) for p, v in (("eager", 100), ("amp", 200), ("fast", 250))]
    spec = "step | metrics: images_per_second | against: eager, amp"
    text = report.fill(f"<!-- results: {spec} -->\n<!-- end -->", results)
    assert "| how | images/s | against eager | against amp | n |" in text
    assert "| eager | 100 |  | 0.50 x | 3 |" in text
    assert "| amp | 200 | 2.00 x |  | 3 |" in text
    assert "| fast | 250 | 2.50 x | 1.25 x | 3 |" in text


def test_a_table_across_has_a_column_a_provider():
    provenance = born()
    results = [(speed(p, v), provenance) for p, v in (("eager", 100), ("fast", 250))]
    results.append((speed("fast", 8, case="resnet18 batch 8"), provenance))
    spec = "step | across: images_per_second"
    text = report.fill(f"<!-- results: {spec} -->\n<!-- end -->", results)
    assert "| case; images/s | eager | fast |" in text
    assert "| resnet20 batch 8 | 100 | 250 (2.50 x) |" in text
    assert "| resnet18 batch 8 |  | 8 |" in text


def test_a_table_across_has_a_column_a_ratio():
    def times(case, **ms):
        return [Row("networks", case, p, "time", "ms", 1, t, t, t) for p, t in ms.items()]

    spec = "networks | across: time | ratios: fastres / inductor, fastres / eager"
    block = f"<!-- results: {spec} -->\n<!-- end -->"
    first, second = born(), born("2026-01-03")
    results = [(row, first) for row in times("net, training", eager=8, inductor=5, fastres=4)]
    results += [(row, first) for row in times("net, inference", eager=3, fastres=2)]
    text = report.fill(block, results)
    header = (
        "| case; time, ms | eager | inductor | fastres | fastres / inductor | fastres / eager |"
    )
    assert header in text
    assert "| net, training | 8 | 5 | 4 | 1.25 x | 2.00 x |" in text
    # Whom nobody measured beside it, in that run, it is not compared with.
    assert "| net, inference | 3 |  | 2 |  | 1.50 x |" in text
    results += [(row, second) for row in times("net, training", fastres=1)]
    assert "| net, training | 8 | 5 | 1 |  |  |" in report.fill(block, results)
    with pytest.raises(ValueError, match="a ratio is written C / D"):
        report.fill(block.replace("fastres / inductor", "fastres"), results)


def test_a_block_chooses_its_rows():
    results = [
        (speed("eager", 1), born()),
        (speed("fast", 2), born()),
        (speed("fast", 3, case="resnet18 batch 8"), born()),
        (Row("step", "resnet20 batch 8", "fast", "time", "ms", 1, 4, 4, 4), born()),
    ]
    spec = "step | case: resnet20 | metrics: time | providers: fast, eager"
    text = report.fill(f"<!-- results: {spec} -->\n<!-- end -->", results)
    assert "| case | how | time, ms |" in text
    assert "| resnet20 batch 8 | fast | 4 |" in text
    assert "images/s" not in text
    assert "resnet18" not in text
    with pytest.raises(ValueError, match="'case resnet20' is none of case:"):
        report.fill("<!-- results: step | case resnet20 -->\n<!-- end -->", results)
    assert "Not measured yet" in report.fill("<!-- results: nothing -->\n<!-- end -->", results)


def test_measurements_outside_of_tables_are_found():
    text = "It makes 1,500 images/s and is 3.2x faster; 12 ms; 91.3 % accuracy; 4 x slower."
    assert len(report.loose_numbers(text)) == 5
    block = "<!-- results: s -->\n1,500 images/s\n<!-- end -->"
    fence = "```\n1,500 images/s\n```"
    harmless = "2 cores, 50,000 images, 6 GB of disk, 10 epochs, 32x32 pixels, Python 3.11"
    assert report.loose_numbers(f"{block}\n{fence}\n{harmless}") == []


def drawn_results():
    provenance = born()
    results = [(speed(p, v), provenance) for p, v in (("eager", 100.0), ("fast", 250.0))]
    for suite, name in (("depth curve", "resnet{} batch 8"), ("batch curve", "resnet20 batch {}")):
        rows = [speed("fast", 5e3 / size, suite, name.format(size)) for size in (20, 110)]
        results += [(row, provenance) for row in rows]
    results.append((speed("dali", 9.0, "loaders", "alone"), provenance))
    floor = Row(
        "roofline", "resnet20 batch 8, bf16, 2 threads", "fast", "floor", "ms", 1, 20, 20, 20
    )
    results.append((floor, provenance))
    for case, who in (
        ("cifar10 5000 resnet20", "fast"),
        ("cifar10 50000 resnet20", "peer_x"),
        ("cifar10 50000 resnet20", "fast"),
    ):
        for metric, unit, value in (("train_seconds", "s", 30.0), ("test_accuracy", "%", 90.0)):
            results.append(
                (Row("train", case, who, metric, unit, 1, value, value, value), provenance)
            )
    return results


def test_pictures_show_their_rows_alone():
    found = {picture.kind: picture for picture in plots.pictures(drawn_results())}
    assert set(found) == {"ladder", "loaders", "cost", "accuracy"}
    assert {row.suite for row in found["ladder"].rows} == {"step", "roofline"}
    assert {row.suite for row in found["cost"].rows} == {"depth curve", "batch curve"}
    figure = found["ladder"].draw()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["100", "250   2.50 x", "roofline 400"]
    (panel,) = found["accuracy"].draw().axes
    runs = {text.get_text() for text in panel.get_legend().get_texts()}
    assert panel.get_title(loc="left") == "cifar10"
    assert runs == {"resnet20: fast, n = 1", "resnet20: peer_x, n = 1"}
    assert plots.pictures([]) == []
    for picture in found.values():
        assert f"rows {picture.fingerprint}<".encode() in picture.svg()
    assert found["cost"].svg() == found["cost"].svg()


def test_a_picture_is_stale_when_a_row_changes():
    results = drawn_results()
    before = {picture.kind: picture.fingerprint for picture in plots.pictures(results)}
    changed = [*results[:-1], (replace(results[-1][0], median=91.0), results[-1][1])]
    after = {picture.kind: picture.fingerprint for picture in plots.pictures(changed)}
    assert {kind for kind in after if after[kind] != before[kind]} == {"accuracy"}


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A README and a folder of results and pictures, which the report takes for the project's."""
    results, readme, pictures = (
        tmp_path / "results",
        tmp_path / "README.md",
        tmp_path / "docs/plots",
    )
    results.mkdir()
    write_results("step", [row for row, _ in drawn_results()], born(), results)
    readme.write_text(
        "# x\n\n<!-- results: step -->\n<!-- end -->\n\n<!-- plots: ladder -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(report, "DOCUMENTS", (readme, tmp_path / "docs" / "results.md"))
    monkeypatch.setattr(report, "PLOTS", pictures)
    monkeypatch.setattr(report, "read_results", lambda: read_results(results))
    return tmp_path


def test_the_report_writes_tables_and_pictures_and_then_agrees(documents, capsys):
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    text = (documents / "README.md").read_text()
    (picture,) = (documents / "docs" / "plots").iterdir()
    assert f"](docs/plots/{picture.name})" in text
    assert "2.50 x eager" in text
    assert report.main(["--check"]) == 0
    # What nobody shows any more goes.
    (picture.parent / "old.svg").write_text("old")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("where", "old", "new"),
    [
        ("README.md", "| fast | 250 |", "| fast | 251 |"),
        ("README.md", "# x", "# x\n\nIt makes 9,000 images/s."),
        ("results/*.csv", ",250.0", ",251.0"),
        ("docs/plots/*.svg", "rows ", "rows 0"),
    ],
)
def test_a_planted_number_turns_the_check_red(documents, capsys, where, old, new):
    assert report.main([]) == 0
    (path,) = documents.glob(where)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert report.main(["--check"]) == 1
    capsys.readouterr()


def test_a_certificate_says_where_and_how_a_number_was_born():
    provenance = make_provenance("fp32", ["python", "-m", "x", "a b"])
    assert provenance["command"] == "python -m x 'a b'"
    assert provenance["machine"]["cores"] >= 1
    assert provenance.keys() >= {"versions", "commit", "date", "clocks"}


def test_every_result_has_its_certificate():
    for path in RESULTS.glob("*.csv"):
        provenance = json.loads(path.with_suffix(".json").read_text())
        assert provenance.keys() >= {"machine", "versions", "commit", "date", "command", "dtype"}
    for row, _ in read_results():
        assert row.low <= row.median <= row.high
        assert row.n >= 1


def test_the_documents_agree_with_the_rows(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out

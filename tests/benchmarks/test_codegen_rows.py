"""The rows of the codegen report, and the page that is made from them."""

import json
from dataclasses import replace

import pytest

from benchmarks.harness.rows import read_results
from benchmarks.report import codegen

CARD = {
    "arch": "sm_90",
    "precision": "bf16",
    "model": "resnet20",
    "layer": "stage1",
    "kernel": "conv_fprop_kernel",
    "variant": "statistics out",
    "tile": "128x16x32 w4 s4",
    "configured_by": "heuristics",
    "registers": 52,
    "spills": 0,
    "shared_bytes": 2048,
    "tensor_core_instructions": 4,
    "pixel_load_bits": 128,
    "roofline_us_estimate": 7.8,
    "launches": 3,
    "declared_bytes": 33_600_000,
    "declared_flops": 2_400_000_000,
}
AROUND = CARD | {"kernel": "bn_stats_kernel", "configured_by": "fprop on cudnn"}
PAGE = "a\n<!-- codegen: worst -->\nold\n<!-- end -->\n<!-- codegen: sm_90 --><!-- end -->\n"


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Rows of two architectures in a folder of their own, as `read_results` finds them."""
    entries = [
        CARD,
        CARD | {"arch": "sm_80", "registers": 99, "spills": 2},
        AROUND | {"tensor_core_instructions": 0, "pixel_load_bits": None},
        CARD | {"layer": "stem", "tile": "64", "registers": 60, "pixel_load_bits": 16},
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(entries))
    write = codegen.write_results
    monkeypatch.setattr(codegen, "write_results", lambda *a: write(*a, folder=tmp_path))
    assert codegen.main(["collect", str(path)]) == 0
    return read_results(tmp_path)


def test_rows_hold_each_number_once(collected):
    rows = {(row.case, row.provider, row.metric): row.median for row, _ in collected}
    form = "conv_fprop_kernel | statistics out"
    case = f"bf16 | resnet20 | stage1 | {form} | 128x16x32 w4 s4 | heuristics"
    assert rows[case, "sm_90", "registers"] == 52
    assert rows[case, "sm_80", "registers"] == 99
    assert rows[case, "sm_90", "declared_bytes"] == 33_600_000
    assert (case, "sm_80", "declared_bytes") not in rows
    assert {row.suite for row, _ in collected} == {"kernel_card"}
    assert {provenance["dtype"] for _, provenance in collected} == {"bf16"}
    assert "fastres.kernels.tools.codegen --arch sm_80" in collected[0][1]["command"]


def test_the_page_shows_the_worst_and_every_heuristic_launch(collected):
    page = codegen.fill(PAGE.replace("sm_90 --><", "sm_90 -->\n<"), collected)
    assert "old" not in page
    # The stem's narrow loads are no fault; its registers count.
    assert "| conv_fprop | sm_90 | 2 | 60 | 0 | 2.0 | 4 | 128 |" in page
    assert "| conv_fprop | sm_80 | 1 | 99 | 2 | 2.0 | 4 | 128 |" in page
    assert "| bn_stats | sm_90 | 1 | 52 | 0 | 2.0 |  |  |" in page
    line = "| conv_fprop | statistics out | resnet20 stage1 | 128x16x32 w4 s4 | 3 | 52 | 2.0 | 4 | "
    assert line + "128 | 33.6 | 2.4e+03 | 7.8 |" in page
    assert page.count("resnet20 stage1") == 1
    assert codegen.fill(page, collected) == page


def test_issue_time_is_shown_where_a_report_has_it(collected):
    counted = {
        "issue_us_estimate": 24.0,
        "programs_per_multiprocessor": 6,
        "warp_instructions": 22_000_000,
    }
    older = codegen.rows_of([CARD])
    rows = codegen.rows_of([CARD | counted, CARD | {"layer": "stem"}])
    assert {row.metric for row in rows} - {row.metric for row in older} == set(counted)
    provenance = collected[0][1]
    page = PAGE.replace("sm_90 --><", "sm_90 -->\n<")
    filled = codegen.fill(page, [(row, provenance) for row in rows])
    assert "| roofline, us (ESTIMATE) | issue, us (ESTIMATE); CTAs an SM |" in filled
    assert "| 7.8 | 24; 6 |" in filled
    assert "| 7.8 |  |" in filled
    assert "issue" not in codegen.fill(page, [(row, provenance) for row in older])


def test_the_page_shows_the_newest_report_in_bf16_alone(collected):
    (row, by), *_ = collected
    gone = replace(row, case=row.case.replace("conv_fprop_kernel", "gone_kernel"))
    older = (gone, by | {"date": "2020-01-01T00:00:00+00:00"})
    other = (gone, by | {"date": "2120-01-01T00:00:00+00:00", "dtype": "fp32-tf32"})
    assert codegen.fill(PAGE, [older, *collected, other]) == codegen.fill(PAGE, collected)


def test_the_page_agrees_with_the_rows(capsys):
    assert codegen.main(["page", "--check"]) == 0, capsys.readouterr().out
    assert "resnet18 stage4" in codegen.PAGE.read_text()


def test_a_planted_number_turns_the_check_red(tmp_path, monkeypatch):
    page = tmp_path / "codegen.md"
    page.write_text(codegen.PAGE.read_text().replace("| conv_fprop | sm_90 |", "| x | y |"))
    monkeypatch.setattr(codegen, "PAGE", page)
    assert codegen.main(["page", "--check"]) == 1
    assert codegen.main(["page"]) == 0
    assert page.read_text() == codegen.fill(page.read_text(), read_results())


def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "report.json").write_text('[{"precision": "bf16"}]')
    assert codegen.main(["collect", str(tmp_path / "report.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

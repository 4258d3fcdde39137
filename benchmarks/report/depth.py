"""A study of depth (`fastres study degradation`) as rows, and its picture from rows again.

Of each depth and kind, over the seeds: errors, gradients and responses at the end (suite
`degradation`), errors and gradients by epoch, responses by layer and by block (suites `degradation
epoch`, `degradation layer`, `degradation block`).
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.harness.rows import Row, summarize
from fastres.studies.picture import NetLines
from fastres.studies.records import (
    KINDS,
    NetRecord,
    block_rows,
    epoch_rows,
    layer_rows,
)

__all__ = ["SUITE", "lines_of_rows", "newest_study", "rows_of_study"]

SUITE = "degradation"
_UNITS = {
    "train_error": "%",
    "test_error": "%",
    "gradient_norm": "L2 norm",
    "gradient_at_start": "L2 norm",
    "gradient_at_end": "L2 norm",
    "filters_at_end": "L2 norm",
    "residual_share": "RMS of F(x) / RMS of x",
    "response": "standard deviation",
}
_DEPTH = re.compile(r"^(.*), (\d+) layers")
_Values = dict[tuple[str, str, str, str], list[float]]


def _case(net: NetRecord) -> str:
    summary = net["summary"]
    return (
        f"{summary['dataset']} {summary['train_images']} w{summary['width']:g} "
        f"{summary['epochs']:g} epochs batch {summary['batch_size']}, {net['depth']} layers"
    )


def rows_of_study(nets: Sequence[NetRecord]) -> list[Row]:
    """Return the rows of a study; one of several seeds holds their median, lowest and highest."""
    values: _Values = {}
    for net in nets:
        case, kind = _case(net), net["kind"]

        def add(suite: str, case: str, metric: str, value: float, kind: str = kind) -> None:
            values.setdefault((suite, case, kind, metric), []).append(value)

        by_epoch, by_layer, by_block = epoch_rows([net]), layer_rows([net]), block_rows([net])
        shares = [row["residual_share"] for row in by_block if row["residual_share"] is not None]
        for metric in ("train_error", "test_error"):
            add(SUITE, case, metric, by_epoch[-1][metric])
        add(SUITE, case, "gradient_at_start", net["gradient_at_start"])
        add(SUITE, case, "filters_at_end", net["first_layer_norm"])
        if "gradient_norm" in by_epoch[-1]:
            add(SUITE, case, "gradient_at_end", by_epoch[-1]["gradient_norm"])
        if shares:
            add(SUITE, case, "residual_share", statistics.mean(shares))
        add(SUITE, case, "response", statistics.mean(row["std"] for row in by_layer))
        for row in by_epoch:
            for metric in ("train_error", "test_error", "gradient_norm"):
                if metric in row:
                    add(f"{SUITE} epoch", f"{case}, epoch {row['epoch']:g}", metric, row[metric])
        for row in by_layer:
            add(f"{SUITE} layer", f"{case}, layer {row['number']}", "response", row["std"])
        for row in by_block:
            if row["residual_share"] is not None:
                where = f"{case}, block {row['number']}"
                add(f"{SUITE} block", where, "residual_share", row["residual_share"])
    return [
        summarize(suite, case, kind, metric, _UNITS[metric], found)
        for (suite, case, kind, metric), found in values.items()
    ]


def newest_study(rows: Iterable[Row]) -> tuple[str, list[Row]]:
    """Return what the last study among `rows` trained on, and its rows; nothing where none is."""
    studies: dict[str, list[Row]] = {}
    for row in rows:
        if row.suite.partition(" ")[0] == SUITE and (found := _DEPTH.match(row.case)):
            studies.setdefault(found[1], []).append(row)
    return list(studies.items())[-1] if studies else ("", [])


def lines_of_rows(rows: Sequence[Row]) -> list[NetLines]:
    """Return what is drawn of each network, the medians over its seeds."""
    nets: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        found = _DEPTH.match(row.case)
        if found:
            nets.setdefault((int(found[2]), row.provider), []).append(row)

    def numbered(of_net: Sequence[Row], what: str, metric: str) -> Mapping[float, float]:
        return {
            float(row.case.rpartition(f", {what} ")[2]): row.median
            for row in of_net
            if (row.suite, row.metric) == (f"{SUITE} {what}", metric)
        }

    return [
        NetLines(
            kind=kind,
            depth=depth,
            train_error=numbered(of_net, "epoch", "train_error"),
            test_error=numbered(of_net, "epoch", "test_error"),
            gradient=numbered(of_net, "epoch", "gradient_norm"),
            shares=list(numbered(of_net, "block", "residual_share").values()),
            responses=list(numbered(of_net, "layer", "response").values()),
        )
        for (depth, provider), of_net in nets.items()
        for kind in KINDS
        if kind == provider
    ]

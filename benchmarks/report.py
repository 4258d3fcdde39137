"""Write the result tables of the documents from benchmarks/results: `python -m benchmarks.report`.

A table stands between `<!-- results: SUITE -->` and `<!-- end -->`; nothing else is touched.
`--check` changes nothing and fails where a document differs from the rows.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, read_results

__all__ = ["fill", "main", "table"]

DOCUMENTS = (Path(__file__).parents[1] / "README.md",)
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _value(row: Row) -> str:
    median = f"{row.median:,.0f}" if row.median >= 1000 else f"{row.median:.4g}"
    if row.n == 1:
        return f"{median} {row.unit}"
    low, high = (f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in (row.low, row.high))
    return f"{median} {row.unit} ({low} to {high}, n = {row.n})"


def table(suite: str, results: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """Lay out all rows of a suite as a Markdown table, one line a case, provider and machine."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row, certificate in results:
        if row.suite == suite:
            machine = certificate["machine"]
            vectors = machine["cpu_vectors"]
            name = machine["gpu"] or f"{machine['cores']} cores {machine['cpu']}, {vectors}"
            versions = f"torch {certificate['versions']['torch']}, {certificate['date'][:10]}"
            key = (row.case, row.provider, f"{name}; {versions}")
            lines.setdefault(key, {})[row.metric] = _value(row)
    metrics = list(dict.fromkeys(metric for cells in lines.values() for metric in cells))
    header = ["case", "how", *(metric.replace("_", " ") for metric in metrics), "where"]
    text = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for (case, provider, where), cells in lines.items():
        row_cells = [case, provider, *(cells.get(metric, "") for metric in metrics), where]
        text.append(f"| {' | '.join(row_cells)} |")
    return "\n".join(text) + "\n"


def fill(document: str, results: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """Return `document` with every result block written anew."""
    return _BLOCK.sub(lambda m: m.group(1) + table(m.group(2), results) + m.group(3), document)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args(argv).check
    results = read_results()
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        filled = fill(text, results)
        if filled != text:
            stale.append(path.name)
            if not check:
                path.write_text(filled)
    if stale:
        print(f"{'differs from the results' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

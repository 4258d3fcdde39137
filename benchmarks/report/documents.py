"""Write tables and plots of the documents from benchmarks/results: `python -m benchmarks.report`.

A document says where, and nothing else of it is touched:

    <!-- results: SUITE | case: TEXT | metrics: A, B | providers: C, D --> a table <!-- end -->
    <!-- results: SUITE | against: C, D --> with ratios to the providers C and D <!-- end -->
    <!-- results: SUITE | across: A -->     the metric A alone, a column a provider <!-- end -->
    <!-- results: SUITE | across: A | ratios: C / D, C / E --> and one a ratio <!-- end -->
    <!-- plots: KIND -->                    pictures <!-- end -->
    <!-- published: paper -->              the paper's errors beside ours <!-- end -->
    <!-- recipe: NAME -->                   its values, as TOML <!-- end -->
    <!-- network: KIND -->                  what architecture.py counts <!-- end -->

All behind the suite is optional. Pictures are kept in docs/plots. `--check` changes nothing and
fails where a document or a picture differs from the rows, or a document states a measurement
outside of a table. Links that quote a line of source are set to where it stands.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.rows import Result, read_results
from benchmarks.report.architecture import network_table, relink
from benchmarks.report.plots import Picture, pictures
from benchmarks.report.published import paper_table
from benchmarks.report.tables import choose, cross_table, table
from fastres.output import reader_may_leave
from fastres.recipe_file import as_toml
from fastres.recipes import built_in

__all__ = ["fill", "loose_numbers", "main"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "your-own-network.md",
    ROOT / "docs" / "recipes.md",
    ROOT / "docs" / "why-residual.md",
    ROOT / "docs" / "why-residual.ko.md",
)
PLOTS = ROOT / "docs" / "plots"
_BLOCK = re.compile(
    r"(<!-- (results|plots|published|recipe|network): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL
)
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
# A number with a unit that only a measurement has.
_MEASURED = re.compile(
    r"\d[\d.,]*\s*(?:images/s|img/s|GB/s|[GT]FLOP/s|ms\b|(?:x|times) (?:faster|slower)|"
    r"% (?:test )?accuracy|% faster|% slower)"
)


def fill(document: str, results: Sequence[Result], plots: str = "docs/plots") -> str:
    """Return `document` with every block written anew.

    Args:
        document: Markdown.
        results: of `read_results`.
        plots: folder of the pictures, as seen from the document.

    Raises:
        ValueError: for a block that nobody can write.
    """

    def block(match: re.Match[str]) -> str:
        opening, what, spec, closing = match.groups()
        if what == "results":
            text = _table(spec, results)
        elif what == "plots":
            text = _links(spec, results, plots)
        elif what == "published":
            text = _published(spec, results)
        elif what == "recipe":
            text = f"\n```toml\n{as_toml(built_in(spec))}```\n\n"
        else:
            text = f"\n{network_table(spec)}\n"
        return opening + text + closing

    return _BLOCK.sub(block, document)


_OPTIONS = ("case", "metrics", "providers", "against", "across", "ratios")


def _table(spec: str, results: Sequence[Result]) -> str:
    suite, *filters = (part.strip() for part in spec.split("|"))
    options: dict[str, str] = {}
    for part in filters:
        key, colon, value = part.partition(":")
        if not colon or key not in _OPTIONS:
            wanted = ", ".join(f"{name}:" for name in _OPTIONS)
            raise ValueError(f"results block {spec!r}: {part!r} is none of {wanted}")
        options[key] = value.strip()

    def names(key: str) -> list[str]:
        return [name.strip() for name in options[key].split(",")] if key in options else []

    metrics, case = names("metrics"), options.get("case", "")
    chosen = choose(results, suite, case=case, metrics=metrics, providers=names("providers"))
    if "across" in options:
        pairs = [name.split(" / ") for name in names("ratios")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"results block {spec!r}: a ratio is written C / D")
        text = cross_table(chosen, options["across"], [(first, second) for first, second in pairs])
    else:
        text = table(chosen, metrics, names("against"))
    # Markdown needs an empty line between a comment and a paragraph, or a table behind one.
    return f"\n{text}\n"


def _published(spec: str, results: Sequence[Result]) -> str:
    if spec != "paper":
        raise ValueError(f"published block {spec!r}: there is only paper")
    return f"\n{paper_table(results)}\n"


def _links(kind: str, results: Sequence[Result], folder: str) -> str:
    found = [picture for picture in pictures(results) if picture.kind == kind]
    if not found:
        return "\nNot measured yet.\n\n"
    return "\n" + "".join(f"![{p.title}]({folder}/{p.name}.svg)\n\n" for p in found)


def loose_numbers(document: str) -> list[str]:
    """Return the measurements that a document states outside of its tables and code."""
    return _MEASURED.findall(_FENCE.sub("", _BLOCK.sub("", document)))


def _write_plots(wanted: Sequence[Picture], folder: Path, *, check: bool) -> list[str]:
    """Draw what differs from its rows and remove what nobody shows; return the names."""
    present = {path.stem: path for path in folder.glob("*.svg")}
    stale = []
    for picture in wanted:
        path = present.pop(picture.name, None)
        if path is None or f"rows {picture.fingerprint}<" not in path.read_text():
            stale.append(f"{picture.name}.svg")
            if not check:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{picture.name}.svg").write_bytes(picture.svg())
    for path in present.values():
        stale.append(path.name)
        if not check:
            path.unlink()
    return stale


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args(argv).check
    results = read_results()
    stale, wrong = [], []
    texts = {path: path.read_text() for path in DOCUMENTS if path.exists()}
    for path, text in texts.items():
        try:
            filled = fill(text, results, os.path.relpath(PLOTS, path.parent))
            filled = relink(filled, path.parent)
        except ValueError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr)
            return 2
        wrong += [f"{path.name}: {number!r} is in no row" for number in loose_numbers(text)]
        if filled != text:
            stale.append(path.name)
            if not check:
                path.write_text(filled)
    shown = [p for p in pictures(results) if any(f"{p.name}.svg" in t for t in _current(texts))]
    stale += _write_plots(shown, PLOTS, check=check)
    if stale:
        print(f"{'differs from the results' if check else 'written'}: {', '.join(stale)}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong or (check and stale) else 0


def _current(texts: dict[Path, str]) -> list[str]:
    """Return the documents as they are now on the disk."""
    return [path.read_text() for path in texts]

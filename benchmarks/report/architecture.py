"""What the documents state of the networks themselves, counted by `fastres.model.summary`.

    <!-- network: layers -->   the 3x3 layers that open and go on with each stage of resnet20
    <!-- network: sizes -->    parameters and operations of whole nets, by shortcut

Quoted lines of source are links whose text is the line: [`code`](path/file.py#L12).
"""

import re
from pathlib import Path
from typing import Literal

__all__ = ["network_table", "relink"]

_LINK = re.compile(r"\[`([^`\n]+)`\]\(([^)#\n]+\.py)#L(\d+)\)")


def network_table(what: str) -> str:
    """Return the table `what` as Markdown.

    Raises:
        ValueError: for one that there is not.
    """
    if what == "layers":
        return _layers()
    if what == "sizes":
        return _sizes()
    raise ValueError(f"network block {what!r} is none of layers, sizes")


def _layers() -> str:
    from fastres.model.resnet import create_model
    from fastres.model.summary import summarize

    lines = [
        "| layer of resnet20 | output map | filters | parameters | multiply-accumulates |",
        "| --- | --- | --- | --- | --- |",
    ]
    for layer in summarize(create_model("resnet20", shortcut="A")).layers:
        if layer.kind == "Conv2d" and re.fullmatch(r"layer\d\.0\.conv[12]", layer.name):
            filters, height, width = layer.output
            lines.append(
                f"| `{layer.name}` | {height} x {width} | {filters} | {layer.params:,} "
                f"| {layer.macs:,} |"
            )
    return "\n".join(lines) + "\n"


def _sizes() -> str:
    from fastres.model.resnet import create_model
    from fastres.model.summary import summarize

    ways: list[tuple[str, str, Literal["A", "B"]]] = [
        ("plain", "none", "A"),
        ("resnet", "A, zero padding", "A"),
        ("resnet", "B, 1x1 projection", "B"),
    ]
    lines = ["| net | shortcuts | parameters | MFLOP, forward |", "| --- | --- | --- | --- |"]
    for depth in (20, 56):
        for kind, how, option in ways:
            summary = summarize(create_model(f"{kind}{depth}", shortcut=option))
            flops = summary.forward_flops / 1e6
            lines.append(f"| {kind}{depth} | {how} | {summary.params:,} | {flops:.2f} |")
    return "\n".join(lines) + "\n"


def relink(document: str, folder: Path) -> str:
    """Return `document` with every quoted line of source linked to where it stands now.

    Args:
        document: Markdown.
        folder: where it lies.

    Raises:
        ValueError: for a quotation that stands in no line of its file.
    """

    def link(match: re.Match[str]) -> str:
        code, path, number = match[1], match[2], int(match[3])
        lines = (folder / path).read_text().splitlines()
        found = [place for place, line in enumerate(lines, 1) if line.strip() == code]
        if not found:
            raise ValueError(f"`{code}` is no line of {path}")
        # Some lines stand in two classes; a change moves them by less than what lies between.
        nearest = min(found, key=lambda place: abs(place - number))
        return f"[`{code}`]({path}#L{nearest})"

    return _LINK.sub(link, document)

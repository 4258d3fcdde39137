"""Draw docs/fused-block.svg: `python docs/draw_fused_block.py`.

Two rows of one basic block, forward from left to right and backward from right to left. A rounded
box is a tensor in memory, a square one a launch, a small one what its last program makes; arrows
show the main flow. Plain strings, no packages: the picture is as easy to change as the text.
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1180, 640
INK, PAPER, MUTED = "#1f2937", "#ffffff", "#6b7280"
KERNEL, TENSOR = "#dbeafe", "#fef3c7"
KERNEL_EDGE, TENSOR_EDGE = "#2563eb", "#d97706"

# Left edges of the columns: x, kernel 1, y1, kernel 2, y2, block end, out.
X, CONV1, Y1, CONV2, Y2, END, OUT = 40, 150, 390, 490, 730, 830, 1070
TENSOR_WIDTH, KERNEL_WIDTH = 70, 200
FORWARD, BACKWARD, FILTERS = 90, 310, 480


def text(x: float, y: float, line: str, *, size: int = 13, colour: str = INK, **style: str) -> str:
    """A line of text centred on (x, y); style: further attributes, as anchor or weight."""
    anchor = style.get("anchor", "middle")
    weight = style.get("weight", "normal")
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(line)}</text>'
    )


def box(x: float, y: float, lines: list[str], *, width: float, height: float, kind: str) -> str:
    """A tensor or a kernel with centred lines; (x, y) is its upper left corner."""
    fill, edge, radius = {
        "tensor": (TENSOR, TENSOR_EDGE, 18),
        "kernel": (KERNEL, KERNEL_EDGE, 3),
    }[kind]
    shape = (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
        f'stroke="{edge}" stroke-width="1.5"/>'
    )
    first = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
    rows = [
        text(x + width / 2, first + 17 * i, line, weight="bold" if i == 0 else "normal")
        for i, line in enumerate(lines)
    ]
    return shape + "".join(rows)


def tensor(x: float, row: float, name: str) -> str:
    """A stored activation or gradient, in the middle of its row."""
    return box(x, row + 22, [name], width=TENSOR_WIDTH, height=46, kind="tensor")


def kernel(x: float, row: float, *lines: str) -> str:
    """A launch: its name, then what its prologue and epilogue do."""
    return box(x, row, list(lines), width=KERNEL_WIDTH, height=90, kind="kernel")


def frame(x: float, y: float, width: float, height: float) -> str:
    """What one launch may do together."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="none" '
        f'stroke="{MUTED}" stroke-width="1.2" stroke-dasharray="2 4"/>'
    )


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through the points with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    colour = MUTED if dashed else INK
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash} '
        'marker-end="url(#head)"/>'
    )


def forward_row() -> list[str]:
    """Conv, conv, block end; scales and shifts, of the last program, above; the shortcut below."""
    middle = FORWARD + 45
    parts = [
        text(X, FORWARD - 50, "forward", size=17, anchor="start", weight="bold"),
        *(tensor(x, FORWARD, name) for x, name in ((X, "x"), (Y1, "y1"), (Y2, "y2"), (OUT, "out"))),
        kernel(CONV1, FORWARD, "conv1", "epilogue: statistics of y1", "last program: a1, b1"),
        kernel(CONV2, FORWARD, "conv2", "prologue: relu(a1·y1 + b1)", "statistics; last: a2, b2"),
        kernel(END, FORWARD, "block end", "relu(a2·y2 + b2 + x)"),
    ]
    for left, right in ((X, CONV1), (Y1, CONV2), (Y2, END)):
        parts.append(arrow((left + TENSOR_WIDTH, middle), (right - 2, middle)))
    for left, right in ((CONV1, Y1), (CONV2, Y2), (END, OUT)):
        parts.append(arrow((left + KERNEL_WIDTH, middle), (right - 2, middle)))
    for left, right in ((CONV1, CONV2), (CONV2, END)):
        start, end, line = left + KERNEL_WIDTH - 60, right + 60, FORWARD - 22
        parts.append(
            arrow((start, FORWARD), (start, line), (end, line), (end, FORWARD - 2), dashed=True)
        )
    below = FORWARD + 118
    entry = END + KERNEL_WIDTH / 2
    shortcut = ((X + 35, FORWARD + 68), (X + 35, below), (entry, below), (entry, FORWARD + 92))
    parts.append(arrow(*shortcut))
    parts.append(text((X + END) / 2, below - 8, "shortcut", colour=MUTED))
    return parts


def backward_row() -> list[str]:
    """Reduction, two input gradients; two filter gradients below."""
    middle, low = BACKWARD + 45, FILTERS + 45
    parts = [
        text(X, BACKWARD - 50, "backward", size=17, anchor="start", weight="bold"),
        *(tensor(x, BACKWARD, name) for x, name in ((X, "dx"), (Y1, "g1"), (Y2, "g2"))),
        tensor(OUT, BACKWARD, "dout"),
        kernel(
            END,
            BACKWARD,
            "BN2 reduction",
            "g2 = dout·(out > 0), its sums",
            "last program: c0, c1, c2",
        ),
        kernel(
            CONV2, BACKWARD, "dgrad2", "prologue: dy2 from g2, y2", "mask by y1; last: c0, c1, c2"
        ),
        kernel(CONV1, BACKWARD, "dgrad1", "prologue: dy1 from g1, y1", "epilogue: + g2"),
        kernel(CONV2, FILTERS, "wgrad2 → dw2", "dy2 from g2, y2", "activation: relu(a1·y1 + b1)"),
        kernel(CONV1, FILTERS, "wgrad1 → dw1", "dy1 from g1, y1", "activation: x"),
    ]
    for left, right in ((OUT, END), (Y2, CONV2), (Y1, CONV1)):
        parts.append(arrow((left, middle), (right + KERNEL_WIDTH + 2, middle)))
    for left, right in ((END, Y2), (CONV2, Y1), (CONV1, X)):
        parts.append(arrow((left, middle), (right + TENSOR_WIDTH + 2, middle)))
    for left, right in ((Y2, CONV2), (Y1, CONV1)):
        stem = left + 35
        parts.append(arrow((stem, BACKWARD + 68), (stem, low), (right + KERNEL_WIDTH + 2, low)))
    for left, right in ((CONV1, CONV2), (CONV2, END)):
        start, end, line = right + 40, left + KERNEL_WIDTH - 40, BACKWARD - 22
        parts.append(
            arrow((start, BACKWARD), (start, line), (end, line), (end, BACKWARD - 2), dashed=True)
        )
    for left in (CONV1, CONV2):
        edge = left - 10
        parts.append(frame(edge, BACKWARD - 10, KERNEL_WIDTH + 20, FILTERS - BACKWARD + 110))
    below = BACKWARD + 118
    entry = CONV1 + KERNEL_WIDTH / 2
    start = (Y2 + 15, BACKWARD + 68)
    parts.append(arrow(start, (Y2 + 15, below), (entry, below), (entry, BACKWARD + 92)))
    parts.append(text(CONV2 + 100, below - 8, "gradient of the shortcut: g2", colour=MUTED))
    return parts


def legend() -> list[str]:
    """What the shapes mean."""
    top = HEIGHT - 32
    return [
        box(END - 60, top - 13, [""], width=34, height=20, kind="tensor"),
        text(END - 18, top + 2, "in memory", anchor="start", colour=MUTED),
        box(END + 70, top - 13, [""], width=34, height=20, kind="kernel"),
        text(END + 112, top + 2, "one launch", anchor="start", colour=MUTED),
        text(
            CONV1 - 10,
            top + 2,
            "dotted: one launch in layers of 16 channels; dashed: numbers a channel",
            anchor="start",
            colour=MUTED,
        ),
    ]


def draw() -> str:
    """The whole picture as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    return "\n".join([head, *forward_row(), *backward_row(), *legend(), "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_name("fused-block.svg").write_text(draw())

"""The progress bar for reading, decoding and downloading."""

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["progress_bar"]


def progress_bar(*, in_bytes: bool = False) -> Progress:
    """A bar on stderr that vanishes at the end; silent when stderr is not a terminal.

    Args:
        in_bytes: count bytes and show the rate, instead of counting items.
    """
    amount: list[ProgressColumn] = [MofNCompleteColumn()]
    if in_bytes:
        amount = [DownloadColumn(), TransferSpeedColumn()]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )

"""Writes entries into a launch table, beside all that it holds already."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import Gpu, forget_table
from fastres.kernels.gpu.table_file import KIND_OF, TABLE_SCHEMA, Basis, read_table
from fastres.strict_json import dumps

__all__ = ["merge_table"]


def merge_table(
    path: Path,
    gpu: Gpu,
    entries: Mapping[str, ConvConfig],
    provenance: Mapping[str, Any],
    *,
    basis: Basis = "measured",
    pdl: bool | None = None,
) -> None:
    """Put entries of one GPU into the table at `path`; all others stay. Atomic: all or nothing.

    Args:
        path: of the table, which need not be there yet.
        gpu: that was measured; for ESTIMATES an architecture, such as ("sm_90", (9, 0)).
        entries: by `table_key`.
        provenance: where they are from; takes the place of what stands there.
        basis: of all these entries.
        pdl: whether the GPU starts kernels by programmatic dependent launch; None leaves that too.

    Raises: ValueError: when a table is there and malformed.
    """
    table: dict[str, Any] = {"schema": TABLE_SCHEMA}
    if path.exists():
        read_table.__wrapped__(path)
        table = json.loads(path.read_text())
    section = table.setdefault(KIND_OF[basis], {}).setdefault(gpu.name, {"entries": {}})
    section |= {"capability": list(gpu.capability), "provenance": dict(provenance)}
    if pdl is not None:
        section["pdl"] = pdl
    new = {key: {"basis": basis} | asdict(config) for key, config in entries.items()}
    section["entries"] = dict(sorted((section["entries"] | new).items()))
    _write(path, _as_text(table))
    forget_table()


def _as_text(table: Mapping[str, Any]) -> str:
    """As JSON, an entry a line."""
    kinds = []
    for kind in KIND_OF.values():
        sections = [_section_as_text(name, of) for name, of in table.get(kind, {}).items()]
        kinds.append(f" {dumps(kind)}: {{" + ",".join(sections) + "\n }")
    return f'{{\n "schema": {table["schema"]},\n' + ",\n".join(kinds) + "\n}\n"


def _section_as_text(name: str, section: Mapping[str, Any]) -> str:
    about = [
        f"   {dumps(key)}: {dumps(value)}" for key, value in section.items() if key != "entries"
    ]
    entries = [f"    {dumps(key)}: {dumps(entry)}" for key, entry in section["entries"].items()]
    about.append('   "entries": {\n' + ",\n".join(entries) + "\n   }")
    return f"\n  {dumps(name)}: {{\n" + ",\n".join(about) + "\n  }"


def _write(path: Path, text: str) -> None:
    """All of the text or, where anything fails, what stood there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

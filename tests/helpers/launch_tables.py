"""Launch tables of tests: files that take the place of the committed one."""

import json

import pytest

from fastres.kernels.gpu import launch_table
from fastres.kernels.gpu.launch_table import Gpu
from fastres.kernels.gpu.table_file import KIND_OF, TABLE_SCHEMA

__all__ = ["ENTRY", "H100", "H200", "as_table", "use_table"]

H100, H200 = Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA H200", (9, 0))
ENTRY = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 1, "num_stages": 1}


def as_table(*sections, schema=TABLE_SCHEMA):
    """A table of sections (GPU or architecture, basis, {key: entry}, pdl or None)."""
    table = {"schema": schema}
    for gpu, basis, entries, pdl in sections:
        section = {"capability": gpu.capability, "pdl": pdl}
        section["entries"] = {key: {"basis": basis} | entry for key, entry in entries.items()}
        table.setdefault(KIND_OF[basis], {})[gpu.name] = section
    return table


@pytest.fixture
def use_table(tmp_path, monkeypatch):
    """Have such a table looked up in, until the test ends."""

    def use(*sections, **options):
        path = tmp_path / "table.json"
        path.write_text(json.dumps(as_table(*sections, **options)))
        monkeypatch.setattr(launch_table, "TABLE_PATH", path)
        launch_table.forget_table()
        return path

    yield use
    launch_table.forget_table()

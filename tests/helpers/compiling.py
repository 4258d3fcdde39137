"""A process whose kernels are compiled: in that of the tests they are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def run_compiling(script: str, **variables: str) -> Any:
    """Run a test file as a program where Triton compiles, and read the JSON that it prints."""
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path} | variables
    done = subprocess.run(
        [sys.executable, script], env=environment, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

"""Train for some seconds and say how fast: what `local.py` starts, several at once.

    python -m fastres.sweeps.trial FOLDER COUNT SECONDS NUMBER

FOLDER holds options.json and gets NUMBER.json. Compiling, capturing and the first steps come
before; then each of the COUNT processes waits until all are ready.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fastres import strict_json
from fastres.cli import guarded
from fastres.config import from_json
from fastres.sweeps.child import end_with_parent

if TYPE_CHECKING:
    from torch import Tensor

    from fastres.engine.trainer import PreparedRun, Trainer

__all__ = ["endless_batches", "main"]

_WARM_STEPS = 3


class _EnoughError(Exception):
    """One batch has been evaluated."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trial and return its exit code."""
    folder, count, seconds, number = sys.argv[1:] if argv is None else argv
    end_with_parent()
    return guarded(lambda: _run(Path(folder), int(count), float(seconds), int(number)), debug=False)


def _run(folder: Path, count: int, seconds: float, number: int) -> int:
    from fastres.engine.launch import prepare_process

    options = folder / "options.json"
    config = from_json(options.read_bytes(), options)
    prepare_process(config)
    import torch

    from fastres.engine.console import RunConsole
    from fastres.engine.machine import peak_memory_mib
    from fastres.engine.run_dir import RunDir
    from fastres.engine.trainer import Trainer

    trainer = Trainer(config, RunDir(folder / "run"), RunConsole(silent=True))
    run = trainer.prepare()
    on_gpu = trainer.runtime.device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    # Images are as large as they get at the end of a run.
    step = run.total_steps - 1
    batches = endless_batches(run)
    try:
        for _ in range(_WARM_STEPS):
            run.step(step, *next(batches))
        _evaluate_a_batch(trainer, run)
        wait()
        (folder / f"{number}.ready").touch()
        while len(list(folder.glob("*.ready"))) < count:
            time.sleep(0.01)
        gpu_share = 0.0
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            gpu_share = 1 - free / total
        images, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            batch, labels = next(batches)
            run.step(step, batch, labels)
            images += len(batch)
        wait()
        rate = images / (time.perf_counter() - started)
    finally:
        run.close()
    found = {
        "images_per_second": rate,
        "host_bytes": int(peak_memory_mib() * 2**20),
        "gpu_share": gpu_share,
    }
    (folder / f"{number}.json").write_text(strict_json.dumps(found))
    return 0


def endless_batches(run: "PreparedRun") -> "Iterator[tuple[Tensor, Tensor]]":
    """Serve the training batches of one epoch after the other."""
    epoch = 0
    while True:
        yield from run.train_loader.serve(epoch)
        epoch += 1


def _evaluate_a_batch(trainer: "Trainer", run: "PreparedRun") -> None:
    """Have the memory that an evaluation takes, too."""
    from fastres.engine.evaluation import evaluate

    def enough() -> None:
        raise _EnoughError

    with suppress(_EnoughError):
        evaluate(
            trainer.model,
            run.eval_loaders["test"],
            trainer.runtime,
            tta=trainer.config.tta,
            after_batch=enough,
        )
    trainer.model.train()


if __name__ == "__main__":
    sys.exit(main())

"""Plans of epochs, each made in a thread while the epoch before it is served.

Planning 50,000 images takes milliseconds, in which a GPU at the start of an epoch would idle.
"""

import contextlib
import threading

from fastres.data.loaders.base import BatchSpec
from fastres.data.plan import Plan

__all__ = ["PlanAhead"]


class _PlanThread(threading.Thread):
    """Makes one plan; `plan` stays None where it cannot.

    Numpy does the work and leaves the interpreter to others meanwhile. Nothing of torch or CUDA is
    called, so that a CUDA graph may be captured beside it. A daemon: no exit waits for it.
    """

    def __init__(self, spec: BatchSpec, epoch: int):
        super().__init__(name=f"plan of epoch {epoch}", daemon=True)
        self.spec, self.epoch = spec, epoch
        self.plan: Plan | None = None

    def run(self) -> None:
        # Whoever misses the plan makes it again, and has the exception where it belongs.
        with contextlib.suppress(Exception):
            self.plan = self.spec.plan(self.epoch)


class PlanAhead:
    """The plans of all epochs, in any order; at most one is made ahead.

    A plan depends on its epoch alone. So one that is made ahead and never asked for costs a few
    milliseconds of a thread, and one that is missing is made when it is asked for: after an
    exception in the thread, or in a process that was forked beside the thread and has none.

    Args:
        spec: which batches to plan.
    """

    def __init__(self, spec: BatchSpec):
        self.spec = spec
        self._ahead: _PlanThread | None = None

    def prepare_after(self, epoch: int) -> None:
        """Begin to plan what most likely follows `epoch`, and return at once.

        In training that is the next epoch; an evaluation serves the same one again.
        """
        following = epoch + 1 if self.spec.training else epoch
        if self._ahead is not None and self._ahead.epoch == following:
            return
        thread = _PlanThread(self.spec, following)
        # Without a thread to be had, the plan is made when it is asked for.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._ahead = thread

    def take(self, epoch: int) -> Plan:
        """Return the plan of `epoch`; wait for the thread only if it is making just this one."""
        ahead = self._ahead
        if ahead is not None and ahead.epoch == epoch:
            self._ahead = None
            ahead.join()
            if ahead.plan is not None:
                return ahead.plan
        return self.spec.plan(epoch)

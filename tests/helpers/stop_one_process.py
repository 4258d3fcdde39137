"""Train under torchrun; process 1 gets a SIGTERM after three steps. Run by test_distributed.py."""

import os
import signal
import sys

from fastres import train
from fastres.engine.step import TrainStep

step = TrainStep.__call__


def step_and_stop(self, number, images, labels):
    step(self, number, images, labels)
    if number == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    TrainStep.__call__ = step_and_stop
    sys.exit(train.main())

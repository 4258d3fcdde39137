"""Train under torchrun; process 1 gets a batch of NaN as its third. Run by test_divergence.py."""

import math
import os
import sys

from fastres import train
from fastres.engine.step import TrainStep

step = TrainStep.__call__


def poisoned_step(self, number, images, labels):
    if number == 2 and os.environ["RANK"] == "1":
        images = images * math.nan
    step(self, number, images, labels)


if __name__ == "__main__":
    TrainStep.__call__ = poisoned_step
    sys.exit(train.main())

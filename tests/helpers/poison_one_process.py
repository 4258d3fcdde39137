"""Training in which process 1 gets a batch of NaN as its third; used by test_divergence.py."""

import math
import os

from fastres import train
from fastres.engine.step import TrainStep

step = TrainStep.__call__


def poisoned_step(self, number, images, labels):
    if number == 2 and os.environ["RANK"] == "1":
        images = images * math.nan
    step(self, number, images, labels)


def main(arguments):
    TrainStep.__call__ = poisoned_step
    return train.main(arguments)

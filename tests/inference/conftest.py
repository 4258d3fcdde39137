"""A run of three classes on a folder of images, made once."""

import pytest

from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY_NET, run_train

CLASSES = ("cat", "dog", "eel")
TINY = (*TINY_NET, "--batch-size", "10", "--epochs", "1")


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "mine", CLASSES, per_class=12)


@pytest.fixture(scope="package")
def run(data, tmp_path_factory):
    """For reading alone."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert run_train(*TINY, "--data-dir", data, "--out", out) == 0
    return out

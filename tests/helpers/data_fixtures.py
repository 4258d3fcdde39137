"""Small fake datasets in every form that fastres reads."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastres.data.readers.cifar import ARCHIVE_FORMATS, ArchiveFormat

CIFAR10_BINARY, CIFAR10_PYTHON, CIFAR100_BINARY, CIFAR100_PYTHON = ARCHIVE_FORMATS


def images(count: int, seed: int = 0) -> np.ndarray:
    """(count, 32, 32, 3) random uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def labels(count: int, classes: int = 10) -> np.ndarray:
    """(count,) int64: 0, 1, ..., classes - 1, 0, ..."""
    return np.arange(count, dtype=np.int64) % classes


def binary_records(pictures: np.ndarray, classes: np.ndarray, label_bytes: int = 1) -> bytes:
    """CIFAR's binary form; the coarse label, where there is one, is 255 minus the fine one."""
    planes = pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)
    fine = classes.astype(np.uint8)[:, None]
    head = fine if label_bytes == 1 else np.concatenate([255 - fine, fine], axis=1)
    return np.concatenate([head, planes], axis=1).tobytes()


def pickled_batch(
    pictures: np.ndarray, classes: np.ndarray, key: str = "labels", protocol: int = 2
) -> bytes:
    """CIFAR's python form, as Python 3 writes it."""
    planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1))
    batch = {
        b"batch_label": b"a batch",
        key.encode(): classes.tolist(),
        b"data": planes,
        b"filenames": [b"%d.png" % i for i in range(len(pictures))],
    }
    return pickle.dumps(batch, protocol=protocol)


def cifar_members(fmt: ArchiveFormat, per_file: int = 20, protocol: int = 2) -> dict[str, bytes]:
    """Every file of a small copy, `per_file` images each; file i holds `images(per_file, i)`."""
    members = {}
    for seed, name in enumerate(fmt.members):
        pictures = images(per_file, seed)
        classes = labels(per_file, len(fmt.variant.classes))
        if fmt.pickled:
            members[name] = pickled_batch(pictures, classes, fmt.variant.label_key, protocol)
        else:
            members[name] = binary_records(pictures, classes, fmt.variant.label_bytes)
    return members


def pack(path: Path, members: dict[str, bytes], folder: str = "some-folder") -> Path:
    """Write members as a .tar.gz (or .tar)."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder: Path, members: dict[str, bytes]) -> Path:
    """Write members as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        (folder / name).write_bytes(content)
    return folder


def image_folder(
    root: Path, classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 3, suffix: str = ".png"
) -> Path:
    """train/ and test/ with `per_class` 32x32 images a class, all different."""
    seed = 0
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(images(1, seed)[0]).save(folder / f"{i:04d}{suffix}")
                seed += 1
    return root

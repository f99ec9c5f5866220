"""Where examples come from: stock TFDS sets without TensorFlow, the embedded digits, any folder of images.

A stock set takes three forms, each made once from the one before: the published files (placed by hand or downloaded),
the TFDS set as ArrayRecord (which anyone's `tfds.data_source` reads), and an .npz of plain arrays, which a start loads
in a fraction of a second. No pickle, no TensorFlow, no jax; TFDS is imported only where a set is prepared, or streamed
from its prepared form, as ImageNet is.

Damage is told in one line before the first step, and nothing damaged is skipped, mended by guess or trained on. What
can be made again is: an .npz from the prepared set. All else is refused by its path: a published file by the digests
of what is in it, a prepared set by the checksum of each record, an image by its decoder. What no checksum covers no one
can tell: a bit of a JPEG that changed and still decodes.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import importlib
import importlib.util
import io
import os
import socket
import sys
import tarfile
import threading
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompute import locks
from jaxcompute.errors import BadInput

Arrays = dict[str, np.ndarray]  # image uint8 [N, H, W, C], label int32 [N]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A set in memory; `classes` are the names of labels 0, 1, ..."""

    name: str
    train: Arrays
    test: Arrays
    classes: tuple[str, ...]


def data_dir() -> Path:
    """JAXCOMPUTE_DATA_DIR, else a folder in the user's cache."""
    if given := os.environ.get("JAXCOMPUTE_DATA_DIR"):
        return _path(given)
    return _path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxcompute" / "data"


def _path(given: str | Path) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:  # a container's user, say
        raise BadInput(f"{given}: there is no such home folder; give another, or set HOME") from None


# ----------------------------------------------------------------------------------------------------------------------
# Stock sets


@dataclasses.dataclass(frozen=True)
class _Published:
    """What is known of a published set before a file of it is read."""

    shape: tuple[int, int, int]
    sizes: dict[str, int]  # split -> examples
    classes: int
    archives: dict[str, dict[str, str]]  # archive -> member -> md5 of its bytes; "" where it is not known


def _idx(*md5: str) -> dict[str, dict[str, str]]:
    names = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
    return {f"{name}.gz": {name: digest} for name, digest in zip(names, md5, strict=True)}


# Members are compared, not archives: a mirror that packs anew changes an archive's checksum and nothing else.
_SETS = {
    "mnist": _Published(
        (28, 28, 1),
        {"train": 60_000, "test": 10_000},
        10,
        _idx(
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "fashion_mnist": _Published(
        (28, 28, 1),
        {"train": 60_000, "test": 10_000},
        10,
        _idx(
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    "cifar10": _Published(
        (32, 32, 3),
        {"train": 50_000, "test": 10_000},
        10,
        {
            "cifar-10-binary.tar.gz": {
                "batches.meta.txt": "728051cd483f366e254dddb25bead8b3",
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
            }
        },
    ),
    "cifar100": _Published(
        (32, 32, 3),
        {"train": 50_000, "test": 10_000},
        100,
        {
            "cifar-100-binary.tar.gz": {
                "coarse_label_names.txt": "",
                "fine_label_names.txt": "",
                "train.bin": "",
                "test.bin": "",
            }
        },
    ),
}


def load(name: str, root: str | Path | None = None) -> Dataset:
    """mnist, fashion_mnist, cifar10 or cifar100; prepared on first use.

    Args:
        name: as TFDS calls it.
        root: the data folder; None: `data_dir()`.

    Returns:
        image uint8 [N, H, W, C] and label int32 [N] of the stock splits, in the order TFDS stores them.

    Raises:
        BadInput: an unknown name; files that are missing (and no network), damaged, or of another set; a folder that
            cannot be written.
    """
    if name not in _SETS:
        raise BadInput(f"no data set '{name}'; there are {', '.join(_SETS)}")
    root = _path(root) if root else data_dir()
    if root.exists() and not root.is_dir():
        raise BadInput(f"{root} is no folder; give another --data_dir")
    cache = root / "jaxcompute" / f"{name}.npz"
    if (dataset := _read_cache(name, cache)) is not None:
        return dataset
    files = {} if _prepared(name, root) else _files(name, root)
    try:
        with _lock(cache.with_suffix(".lock")):
            if (dataset := _read_cache(name, cache)) is not None:  # another process was faster
                return dataset
            print(f"preparing {name} in {root}, once: about a minute", file=sys.stderr, flush=True)
            if not _prepared(name, root):
                _prepare(name, root, _parse(name, files))
            dataset = _decode(name, root)
            _write_cache(dataset, cache)
    except OSError as error:
        raise BadInput(f"{root} cannot be written: {_line(error)}; make room, or give another --data_dir") from error
    return dataset


def store(dataset: Dataset, root: Path) -> Path:
    """The file in a data folder where `load` finds the set: for a stock set that was prepared elsewhere."""
    file = root / "jaxcompute" / f"{dataset.name}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_cache(dataset, file)
    return file


def _read_cache(name: str, path: Path) -> Dataset | None:
    """The .npz, or None where it is missing or damaged: zip keeps a CRC of each array, checked as it is read."""
    published = _SETS[name]
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            splits = {split: {key: arrays[f"{split}_{key}"] for key in ("image", "label")} for split in published.sizes}
            dataset = Dataset(name, **splits, classes=tuple(arrays["classes"].tolist()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{path} is damaged ({error}); making it anew", file=sys.stderr, flush=True)
        return None
    if not _sound(dataset):
        print(f"{path} does not hold {name}; making it anew", file=sys.stderr, flush=True)
        return None
    return dataset


def _sound(dataset: Dataset) -> bool:
    """Has it the sizes, types and range of labels that its name promises?"""
    published = _SETS[dataset.name]
    for split, size in published.sizes.items():
        image, label = getattr(dataset, split)["image"], getattr(dataset, split)["label"]
        if (image.shape, image.dtype) != ((size, *published.shape), np.uint8):
            return False
        if (label.shape, label.dtype) != ((size,), np.int32) or not 0 <= label.min() <= label.max() < published.classes:
            return False
    return len(dataset.classes) == published.classes


def _write_cache(dataset: Dataset, path: Path) -> None:
    """Whole or not at all, whenever it is killed."""
    part = path.with_suffix(".part")
    arrays = {f"{split}_{key}": array for split in ("train", "test") for key, array in getattr(dataset, split).items()}
    try:
        with part.open("wb") as file:
            np.savez(file, classes=np.array(dataset.classes), **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process prepares a set; the others of a sweep wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        locks.flock(file, fcntl.LOCK_EX, "no other run may prepare this set before it is done")
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Published files -> arrays


def _files(name: str, root: Path) -> dict[str, Path]:
    """Archive -> where it lies: placed by hand, else downloaded."""
    manual = root / "downloads" / "manual"
    found: dict[str, Path] = {}
    ignored = []
    for archive in _SETS[name].archives:
        if (own := manual / name / archive).exists():
            found[archive] = own
        elif (shared := manual / archive).exists():
            # both MNISTs use the same names: a file of the other is not ours to complain of
            if "mnist" in name and (other := _owner(archive.removesuffix(".gz"), _gunzip(shared))) not in (name, None):
                ignored.append(f" ({shared} is of {other})")
            else:
                found[archive] = shared
    missing = [archive for archive in _SETS[name].archives if archive not in found]
    if missing:
        found |= _download(name, root, missing, "".join(ignored))
    return found


def _owner(member: str, data: bytes) -> str | None:
    """The set whose published member this is."""
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    for name, published in _SETS.items():
        if digest in [members.get(member) for members in published.archives.values()]:
            return name
    return None


def _download(name: str, root: Path, missing: list[str], ignored: str) -> dict[str, Path]:
    """By TFDS, which checks the registered checksums; with no network an error at once, not after its minutes."""
    manual = root / "downloads" / "manual" / name
    explain = (
        f"{name}: {', '.join(missing)} not found in {manual} or {manual.parent}{ignored}, and {{}}; "
        f"place the published files in {manual}, or run --experiment=digits_cnn, which needs none"
    )
    tfds = _tfds()
    urls = {url.rsplit("/", 1)[-1]: url for url in tfds.builder_cls(name).url_infos}
    if not _reachable(url := urls[missing[0]]):
        raise BadInput(explain.format(f"there is no network: {urllib.parse.urlsplit(url).hostname} cannot be reached"))
    try:
        manager = tfds.download.DownloadManager(
            download_dir=root / "downloads",
            url_infos=tfds.builder_cls(name).url_infos,
            force_checksums_validation=True,
            dataset_name=name,
        )
        return {archive: Path(path) for archive, path in manager.download({m: urls[m] for m in missing}).items()}
    except Exception as error:  # of many libraries
        raise BadInput(explain.format(f"the download failed: {_line(error)}")) from error


def _reachable(url: str, seconds: float = 5.0) -> bool:
    """Does the host of url, or the proxy on the way to it, answer in time? A machine without a network knows sooner."""
    scheme, host = urllib.parse.urlsplit(url).scheme, urllib.parse.urlsplit(url).hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
    target = urllib.parse.urlsplit(proxy or url)
    port = target.port or {"http": 80, "https": 443}.get(target.scheme, 80)
    answered = threading.Event()

    def knock() -> None:
        # a host may have several addresses, the first of which leads nowhere
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), seconds / 2):
            answered.set()

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _parse(name: str, files: dict[str, Path]) -> tuple[dict[str, Arrays], dict[str, list[str]]]:
    """The whole set, checked: split -> arrays, and label -> names where the archive has them."""
    published = _SETS[name]
    members: dict[str, bytes] = {}
    for archive, path in files.items():
        data = _gunzip(path)
        found = _untar(path, data) if ".tar" in archive else {archive.removesuffix(".gz"): data}
        for member, digest in published.archives[archive].items():
            if member not in found:
                raise _damaged(path, f"{member} is not in it")
            if digest and (owner := _owner(member, found[member])) != name:
                # KMNIST too has these file names and sizes: what is read by a stock name has to be that set
                raise BadInput(f"{path}: its {member} is of {owner or 'no set known here'}; place there that of {name}")
        members |= found
    where = ", ".join(map(str, files.values()))
    splits: dict[str, Arrays] = {}
    names: dict[str, list[str]] = {}
    if "mnist" in name:
        for split, prefix in ("train", "train"), ("test", "t10k"):
            splits[split] = {
                "image": _idx_array(where, members[f"{prefix}-images-idx3-ubyte"], (published.sizes[split], 28, 28)),
                "label": _idx_array(where, members[f"{prefix}-labels-idx1-ubyte"], (published.sizes[split],)),
            }
    elif name == "cifar10":
        train = b"".join(members[f"data_batch_{i}.bin"] for i in range(1, 6))
        splits["train"] = _cifar_arrays(where, train, published.sizes["train"], ["label"])
        splits["test"] = _cifar_arrays(where, members["test_batch.bin"], published.sizes["test"], ["label"])
        names["label"] = members["batches.meta.txt"].decode().split()
    else:
        labels = ["coarse_label", "label"]
        splits = {s: _cifar_arrays(where, members[f"{s}.bin"], size, labels) for s, size in published.sizes.items()}
        names["coarse_label"] = members["coarse_label_names.txt"].decode().split()
        names["label"] = members["fine_label_names.txt"].decode().split()
    for label, classes in ("label", published.classes), ("coarse_label", 20):
        if any(arrays[label].max() >= classes for arrays in splits.values() if label in arrays):
            raise _damaged(where, f"it holds a {label} above {classes - 1}")
    if names and len(names["label"]) != published.classes:
        raise _damaged(where, f"it names {len(names['label'])} classes, not {published.classes}")
    return splits, names


def _gunzip(path: Path) -> bytes:
    """At most 200 MB, the largest set and its tar headers; the CRC at the end is checked."""
    limit = 200_000_000
    try:
        with gzip.open(path) as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, _line(error)) from error
    if len(data) > limit:
        raise _damaged(path, f"it unpacks to more than {limit} bytes")
    return data


def _untar(path: Path, data: bytes) -> dict[str, bytes]:
    """Regular members by their last name, in memory: nothing in the archive can choose where to write."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return {Path(m.name).name: file.read() for m in tar if m.isfile() and (file := tar.extractfile(m))}
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _damaged(path, _line(error)) from error


def _idx_array(where: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """IDX: two zero bytes, 8 for uint8, the number of axes, each axis as big-endian int32, then the values."""
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
    if data[: len(header)] != header or len(data) != len(header) + np.prod(shape):
        raise _damaged(where, f"it is no IDX file of {shape}")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _cifar_arrays(where: str, data: bytes, size: int, labels: list[str]) -> Arrays:
    """Per record one byte a label, then 3x32x32 bytes, channels first."""
    if len(data) != size * (len(labels) + 3072):
        raise _damaged(where, f"{size} examples take {size * (len(labels) + 3072)} bytes, not {len(data)}")
    records = np.frombuffer(data, np.uint8).reshape(size, -1)
    image = records[:, len(labels) :].reshape(size, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"image": image} | {label: records[:, i] for i, label in enumerate(labels)}


def _damaged(path: Path | str, why: str) -> BadInput:
    return BadInput(f"{path} is damaged or cut short: {why}; place the published file there anew")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Arrays -> TFDS -> arrays


def _tfds() -> Any:
    """Imported here alone, for it takes most of a second; untyped, for so is much of it."""
    try:
        return importlib.import_module("tensorflow_datasets")
    except ModuleNotFoundError as error:
        raise BadInput(
            f"to prepare a set {error.name} is needed and not installed: pip install tensorflow-datasets "
            "importlib_resources array_record, or place the .npz that another machine has made in <data_dir>/jaxcompute"
        ) from error


def _prepared(name: str, root: Path) -> bool:
    """Does TFDS's folder of this set stand, whatever its version?"""
    return any((root / name).glob("[0-9]*.[0-9]*.[0-9]/dataset_info.json"))


def _prepare(name: str, root: Path, parsed: tuple[dict[str, Arrays], dict[str, list[str]]]) -> None:
    """Writes the set as ArrayRecord where stock TFDS looks for it; stock builders need TensorFlow for this step."""
    from PIL import Image

    tfds = _tfds()
    splits, names = parsed

    def examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, pixels in enumerate(splits[split]["image"]):
            labels = {key: int(values[i]) for key, values in splits[split].items() if key != "image"}
            example = labels | {"image": Image.fromarray(pixels)}
            yield i, example | ({"id": f"{split}_{i:05d}"} if "cifar" in name else {})

    def split_generators(builder: Any, _: Any) -> dict[str, Any]:
        for label, values in names.items():
            builder.info.features[label].names = values
        return {split: examples(split) for split in splits}

    stock = tfds.builder_cls(name)
    with tfds.core.registered.skip_registration():
        local = type(stock.__name__, (stock,), {"name": name, "_split_generators": split_generators})
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        builder = local(data_dir=root, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _decode(name: str, root: Path) -> Dataset:
    """Reads the prepared set back through TFDS, as anyone would."""
    from PIL import Image

    tfds = _tfds()
    try:
        builder = tfds.builder(name, data_dir=root)
        splits = {}
        for split, size in _SETS[name].sizes.items():
            # TFDS's own decoder does the same, with a warning that it would rather have OpenCV
            source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            if len(source) != size:
                raise ValueError(f"its {split} split has {len(source)} examples, not {size}")
            image = np.empty((len(source), *_SETS[name].shape), np.uint8)
            label = np.empty(len(source), np.int32)
            for i, example in enumerate(source):
                pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
                image[i], label[i] = pixels.reshape(image.shape[1:]), example["label"]
            splits[split] = {"image": image, "label": label}
        dataset = Dataset(name, **splits, classes=tuple(builder.info.features["label"].names))
        if not _sound(dataset):
            raise ValueError("its labels are out of range")
        return dataset
    except Exception as error:  # of many libraries
        why = f"is damaged, or cannot be read without TensorFlow: {_line(error)}"
        raise BadInput(f"{root / name} {why}; move it away and it is prepared anew") from error


# ----------------------------------------------------------------------------------------------------------------------
# Prepared sets too large to hold

IMAGENET = {"train": 1_281_167, "validation": 50_000}  # examples of imagenet2012


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a TFDS set, too large to hold: a record an example."""

    folder: str  # of the prepared set
    name: str
    size: int

    def __len__(self) -> int:
        return self.size

    def identity(self) -> str:
        """The number of examples, the size of their files, which are not read, and the split's name."""
        size = sum(file.stat().st_size for file in Path(self.folder).glob(f"*-{self.name}.array_record*"))
        return f"{self.size:,} examples of {size:,} bytes, {self.name} of {'/'.join(Path(self.folder).parts[-3:])}"

    def address(self, i: int) -> list[Any]:
        return [self.folder, self.name, i]


def prepared(name: str, root: str | Path | None = None) -> tuple[dict[str, Split], tuple[str, ...]]:
    """A TFDS set of images and labels that stands in the data folder as ArrayRecord: its splits, and its classes.

    imagenet2012 is made from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in ROOT/downloads/manual, where it
    is not there yet.

    Args:
        name: as TFDS calls it.
        root: the data folder; None: `data_dir()`.

    Raises:
        BadInput: it is not there, is stored in another format, or has no image and label; archives that are missing,
            cut short or of another set; a folder that cannot be written.
    """
    root = _path(root) if root else data_dir()
    if name == "imagenet2012" and not _prepared(name, root):
        archives = _imagenet_archives(root)
        try:
            with _lock(root / "jaxcompute" / f"{name}.lock"):
                if not _prepared(name, root):
                    print(f"preparing {name} in {root}, once: hours, and twice its room", file=sys.stderr, flush=True)
                    _prepare_imagenet(root, *archives)
        except OSError as error:
            message = f"{root} cannot be written: {_line(error)}; make room, or give another --data_dir"
            raise BadInput(message) from error
    folders = sorted((root / name).glob("[0-9]*.[0-9]*.[0-9]/dataset_info.json"))
    if not folders:
        raise BadInput(f"{root / name} holds no prepared set; prepare {name} there with TFDS, as array_record")
    folder = folders[-1].parent
    try:
        builder = _tfds().builder_from_directory(folder)
        features = builder.info.features
        stored = builder.info.file_format.value
        splits = {split: Split(str(folder), split, info.num_examples) for split, info in builder.info.splits.items()}
    except Exception as error:  # of many libraries
        raise BadInput(f"{folder} is damaged: {_line(error)}; move it away and it is prepared anew") from error
    if stored != "array_record":  # what TensorFlow writes by default has no random access
        message = f"{folder} is stored as {stored}; move it away and prepare it as array_record"
        raise BadInput(message + (", or place its archives" if name == "imagenet2012" else ""))
    if not {"image", "label"} <= set(features):
        raise BadInput(f"{folder} has {', '.join(features)}; a set of images has image and label")
    return splits, tuple(features["label"].names)


def _imagenet_archives(root: Path) -> list[Path]:
    manual = root / "downloads" / "manual"
    found = []
    for archive in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        there = [path for path in (manual / "imagenet2012" / archive, manual / archive) if path.exists()]
        if not there:
            raise BadInput(
                f"imagenet2012: {archive} not found in {manual}, nor a prepared set in {root / 'imagenet2012'}; get it "
                "from image-net.org, which asks you to register, and place it there, or give folders of class folders"
            )
        found.append(there[0])
    return found


def _prepare_imagenet(root: Path, train: Path, val: Path) -> None:
    """As `_prepare`, from the archives in one pass each; nothing is extracted to disk."""
    tfds = _tfds()
    stock = tfds.builder_cls("imagenet2012")
    home = Path(sys.modules[stock.__module__].__file__ or "").parent
    val_labels = (home / "validation_labels.txt").read_text().split()  # by the number in a file's name

    def examples(split: str, archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        count = 0
        try:
            for synset, file_name, data in _images_of(archive, nested=split == "train"):
                label = synset or val_labels[int(Path(file_name).stem.rpartition("_")[2]) - 1]
                yield (
                    file_name,
                    {"image": _as_rgb_jpeg(data, archive, file_name), "label": label, "file_name": file_name},
                )
                count += 1
        except (tarfile.TarError, EOFError, ValueError, IndexError) as error:
            raise _damaged(archive, _line(error)) from error
        if count != IMAGENET[split]:
            raise _damaged(archive, f"it holds {count:,} images, not {IMAGENET[split]:,}")

    def split_generators(builder: Any, _: Any) -> dict[str, Any]:
        return {"train": examples("train", train), "validation": examples("validation", val)}

    own = {"name": "imagenet2012", "__module__": stock.__module__, "_split_generators": split_generators}
    with tfds.core.registered.skip_registration():
        local = type("Builder", (stock,), own)
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        builder = local(data_dir=root, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=train.parent))


def _images_of(archive: Path, nested: bool) -> Iterator[tuple[str, str, bytes]]:
    """(synset, file name, bytes) of a tar of images, or of a tar that holds a tar of images for each synset."""
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            if not member.isfile() or (file := tar.extractfile(member)) is None:
                continue
            if not nested:
                yield "", Path(member.name).name, file.read()
                continue
            with tarfile.open(fileobj=file, mode="r:") as inner:
                for image in inner:
                    if image.isfile() and (data := inner.extractfile(image)) is not None:
                        yield Path(member.name).stem, Path(image.name).name, data.read()


def _as_rgb_jpeg(data: bytes, archive: Path, name: str) -> bytes:
    """The image as it is, but for the 22 CMYK ones and the PNG among ImageNet's, which stock TFDS too encodes anew."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                return data
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=100, subsampling=0)
            return out.getvalue()
    except Exception as error:  # of many decoders
        raise _damaged(archive, f"its {name} is no image: {_line(error)}") from error


def example(address: list[Any]) -> tuple[Any, str, int]:
    """What an `address` of Files or Split leads to: the image's path or open file, what to call it, and its label.

    Raises:
        BadInput: a record that is damaged.
    """
    if len(address) == 2:
        path, label = address
        return path, path, label
    folder, split, i = address
    try:
        record = _records(folder, split)[i]
        return io.BytesIO(record["image"]), f"{folder}: example {i} of {split}", int(record["label"])
    except Exception as error:  # of many libraries
        message = f"{folder}: example {i} of {split} is damaged: {_line(error)}"
        raise BadInput(f"{message}; move the folder away and prepare it anew") from error


@functools.cache
def _records(folder: str, split: str) -> Any:
    tfds = _tfds()
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


# ----------------------------------------------------------------------------------------------------------------------
# Sets that need no preparing


def digits() -> Dataset:
    """The 1,797 handwritten digits inside scikit-learn, 8x8, grey values 0 to 16 (Alpaydin and Kaynak 1998).

    `test` is a fifth of each class, drawn once with a fixed seed of its own (359 examples), whatever a run's seed.

    Returns:
        image uint8 [N, 8, 8, 1] of 0 to 16, label int32 [N].

    Raises:
        BadInput: scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")  # found, not imported: that takes a second
    path = Path(spec.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if spec else None
    if path is None or not path.exists():
        raise BadInput("digits come inside scikit-learn, which is not installed: pip install scikit-learn")
    with gzip.open(path, "rt") as file:
        table = np.array(list(csv.reader(file)), np.float32).astype(np.int32)
    image, label = table[:, :-1].astype(np.uint8).reshape(-1, 8, 8, 1), table[:, -1]
    shuffled = np.random.default_rng(0).permutation(len(label))
    rows = [shuffled[label[shuffled] == c] for c in range(10)]
    test = np.sort(np.concatenate([row[: round(len(row) / 5)] for row in rows]))
    train = np.setdiff1d(shuffled, test)
    return Dataset(
        "digits",
        {"image": image[train], "label": label[train]},
        {"image": image[test], "label": label[test]},
        tuple("0123456789"),
    )


_SUFFIXES = ".jpg", ".jpeg", ".png", ".bmp", ".webp"


def folder(train_dir: str | Path, eval_dir: str | Path, size: int) -> Dataset:
    """Two folders of class sub-folders of images (jpg, jpeg, png, bmp, webp), the same classes in both.

    Each image becomes RGB (grey and CMYK are converted, transparency is dropped), is turned as its EXIF data says, its
    short side is resized to `size`, and the centre is cut out. Other files and hidden ones are passed over.

    Args:
        train_dir: becomes `train`.
        eval_dir: becomes `test`.
        size: side of the result, in pixels.

    Returns:
        image uint8 [N, size, size, 3], label int32 [N], by class and file name; `classes` are the sub-folders' names.

    Raises:
        BadInput: a folder that is missing or has no class folders, a class without images, classes that differ, an
            image that cannot be read, is animated, has more than 8 bits a channel or more pixels than PIL's limit, a
            link that leads nowhere.
    """
    if size < 1:
        raise BadInput(f"size is {size}; give the images' side in pixels")
    train, test, classes = files(train_dir, eval_dir)

    def read(files: Files) -> Arrays:
        try:
            image = np.empty((len(files), size, size, 3), np.uint8)
        except MemoryError:
            raise BadInput(f"{len(files)} images of side {size} do not fit into memory; take a smaller side") from None
        with ThreadPoolExecutor() as pool:
            for i, pixels in enumerate(pool.map(lambda path: centre(path, path, size, size), files.paths)):
                image[i] = pixels
        return {"image": image, "label": files.label}

    with warnings.catch_warnings():
        from PIL import Image

        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Dataset("folder", read(train), read(test), classes)


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """A set too large to hold: a file an image."""

    paths: list[str]
    label: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> str:
        """The number of examples and a checksum of their names, sizes and labels; no file is read.

        Raises:
            BadInput: a file that is not there.
        """
        try:
            listing = "\n".join(f"{os.path.basename(path)} {os.path.getsize(path)}" for path in self.paths)
        except OSError as error:
            raise BadInput(f"{error.filename} cannot be read: {error.strerror}; mend or remove it") from None
        return f"{len(self.paths):,} examples, {zlib.crc32(self.label.data, zlib.crc32(os.fsencode(listing))):08x}"

    def address(self, i: int) -> list[Any]:
        return [self.paths[i], int(self.label[i])]


def files(train_dir: str | Path, eval_dir: str | Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Two folders as of `folder`, by class and file name, and the names of the classes; no image is opened.

    Raises:
        BadInput: as `folder`, but for what it finds inside an image.
    """
    train, test = _listing(train_dir), _listing(eval_dir)
    if train.keys() != test.keys():
        differ = ", ".join(sorted(train.keys() ^ test.keys()))
        raise BadInput(f"the class folders of {train_dir} and {eval_dir} differ: {differ}; give both the same")

    def of(listing: dict[str, list[Path]]) -> Files:
        label = np.repeat(np.arange(len(listing), dtype=np.int32), [len(paths) for paths in listing.values()])
        return Files([str(path) for paths in listing.values() for path in paths], label)

    return of(train), of(test), tuple(train)


def _listing(given: str | Path) -> dict[str, list[Path]]:
    """Class -> its images, both by name."""
    root = _path(given)
    if not str(given) or not root.is_dir():
        raise BadInput(f"'{given}' is no folder; give one that holds a sub-folder of images for each class")
    try:
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        classes = {path: sorted(path.iterdir()) for path in entries if path.is_dir()}
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}; mend or remove it") from None
    for path in entries:
        if not path.exists():
            raise BadInput(f"{path} is a link that leads nowhere; mend or remove it")
    if not classes:
        raise BadInput(f"{root} has no class folders; put the images of each class in a sub-folder named after it")
    listing = {}
    for path, files in classes.items():
        listing[path.name] = [
            file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
        ]
        if not listing[path.name]:
            raise BadInput(f"{path} holds no images ({', '.join(_SUFFIXES)}); add some or remove the folder")
    return listing


# ----------------------------------------------------------------------------------------------------------------------
# Images


def centre(file: Any, name: str | Path, short: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: an image whose short side is resized to `short`, and its centre cut out.

    Args:
        file: a path, or an open file of bytes.
        name: what to call it where it cannot be read.
        short: pixels, at least size.
        size: pixels.

    Raises:
        BadInput: it cannot be read as one image.
    """
    from PIL import Image

    image = _decode_image(file, name, lambda width, height: short)
    side = min(image.size) * size / short
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def within(file: Any, name: str | Path, size: int) -> np.ndarray:
    """uint8 [H, W, 3]: a whole image, made smaller where its long side is above `size` pixels. Raises as `centre`."""
    from PIL import Image

    image = _decode_image(file, name, lambda width, height: -(-size * min(width, height) // max(width, height)))
    if (long := max(image.size)) > size:
        shape = tuple(max(1, round(side * size / long)) for side in image.size)
        image = image.resize(shape, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _decode_image(file: Any, name: str | Path, short: Callable[[int, int], int]) -> Any:
    """RGB and upright. A JPEG decodes at 1/2, 1/4 or 1/8 where its short side is still short(width, height) pixels."""
    from PIL import Image, ImageOps

    try:
        if isinstance(file, str | Path) and Path(file).exists() and not Path(file).is_file():
            raise ValueError("it is no file")  # but a pipe, say, that would be waited on for ever
        with Image.open(file) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG with a preview
                raise ValueError("it is animated")
            if image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in image.tile):
                raise ValueError("its pixels have more than 8 bits")
            side = short(*image.size)
            image.draft("RGB", (side, side))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # of many decoders
        raise BadInput(f"{name} cannot be read as one image: {_line(error)}; mend or remove it") from error

"""CIFAR-10 in two files of at most 60 MiB, and back: for a machine without a network.

    python benchmarks/pack_cifar.py pack --pieces=DIR              from the data folder's prepared set
    python benchmarks/pack_cifar.py unpack --pieces=DIR            into the data folder, where `sources.load` finds it

A piece is an .npz: mosaics of images as lossless WebP, which takes 56 % of the pixels' bytes, and with either piece all
the labels, the classes' names and the digest of each array. What is unpacked equals what was packed in every bit, or is
refused. The other machine needs numpy and Pillow, and neither TFDS nor grain.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxcompute.data import sources
from jaxcompute.errors import BadInput

MOST = 60 * 2**20  # bytes of a piece
TILES = 100  # along a side of a mosaic
NAMES = "cifar10-0.npz", "cifar10-1.npz"
KEYS = {"mosaic_00", "count", "side", "train_label", "test_label", "classes", "digests"}  # of each, at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["pack", "unpack"])
    parser.add_argument("--pieces", type=Path, required=True, help="their folder")
    parser.add_argument("--data_dir", type=Path, default=sources.data_dir(), help="$JAXCOMPUTE_DATA_DIR by default")
    given = parser.parse_args()
    try:
        if given.do == "pack":
            for file in pack(sources.load("cifar10", given.data_dir), given.pieces):
                print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
        else:
            print(f"in {place(given.pieces, given.data_dir)}")
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def pack(dataset: sources.Dataset, folder: Path) -> list[Path]:
    """The two pieces of a set of RGB images in memory.

    Raises:
        BadInput: a piece came out larger than 60 MiB.
    """
    image = np.concatenate([dataset.train["image"], dataset.test["image"]])
    rest = {f"{split}_label": getattr(dataset, split)["label"] for split in ("train", "test")}
    rest["classes"] = np.array(dataset.classes)
    rest["digests"] = np.array(json.dumps(digests(dataset)))
    folder.mkdir(parents=True, exist_ok=True)
    left = []
    with ThreadPoolExecutor() as pool:
        for name, half in zip(NAMES, np.array_split(image, 2), strict=True):
            mosaics = {f"mosaic_{i:02}": part for i, part in enumerate(pool.map(webp, parts(half)))}
            part = folder / f".{name}"
            with part.open("wb") as file:
                np.savez(file, count=len(half), side=image.shape[1], **mosaics, **rest)  # pyright: ignore[reportArgumentType]
            if part.stat().st_size > MOST:
                part.unlink()
                raise BadInput(f"{name} would be larger than {MOST // 2**20} MiB: pack a smaller set")
            os.replace(part, folder / name)
            left.append(folder / name)
    return left


def unpack(folder: Path) -> sources.Dataset:
    """What was packed.

    Raises:
        BadInput: a piece is missing, or what comes out is not what went in.
    """
    if missing := [name for name in NAMES if not (folder / name).exists()]:
        raise BadInput(f"{folder} has no {' and no '.join(missing)}; bring both pieces there")
    pieces = [piece(folder / name) for name in NAMES]
    image, rest = np.concatenate([images(each) for each in pieces]), pieces[0]
    cut, wanted = len(rest["train_label"]), json.loads(str(rest["digests"]))
    dataset = sources.Dataset(
        "cifar10",
        {"image": image[:cut], "label": rest["train_label"]},
        {"image": image[cut:], "label": rest["test_label"]},
        tuple(rest["classes"].tolist()),
    )
    wrong = [name for name, digest in digests(dataset).items() if wanted[name] != digest]
    if not np.array_equal(rest["classes"], pieces[1]["classes"]):
        wrong.append("classes")
    if wrong:
        raise BadInput(f"{folder}: {' and '.join(wrong)} came out other than packed; bring the pieces anew")
    return dataset


def piece(file: Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{file} is damaged ({error}); bring it anew") from None
    if missing := KEYS - found.keys():
        raise BadInput(f"{file} is no piece, as it has no {', '.join(sorted(missing))}; bring both pieces anew")
    return found


def images(piece: dict[str, np.ndarray]) -> np.ndarray:
    """[N, side, side, 3] of its mosaics."""
    with ThreadPoolExecutor() as pool:
        tiles = pool.map(partial(untiled, int(piece["side"])), [piece[key] for key in sorted(piece) if "mosaic" in key])
        return np.concatenate([*tiles])[: int(piece["count"])]


def place(folder: Path, data_dir: Path) -> Path:
    """The unpacked set's file in the data folder, where `sources.load` reads it. Raises as `unpack`."""
    file = sources.store(unpack(folder), data_dir)
    sources.load("cifar10", data_dir)
    return file


def make_up(data_dir: Path) -> None:
    """Random images of CIFAR-10's sizes, where the real ones are not: for what asks for speed alone."""
    random = np.random.default_rng(0)
    splits = {
        split: {
            "image": random.integers(0, 256, (size, 32, 32, 3), np.uint8),
            "label": random.integers(0, 10, size, np.int32),
        }
        for split, size in {"train": 50_000, "test": 10_000}.items()
    }
    sources.store(sources.Dataset("cifar10", **splits, classes=tuple(f"made up {i}" for i in range(10))), data_dir)


def parts(image: np.ndarray) -> Iterator[np.ndarray]:
    """[N, side, side, 3] in mosaics [rows * side, TILES * side, 3], the last filled up with black."""
    side = image.shape[1]
    for at in range(0, len(image), TILES**2):
        some = image[at : at + TILES**2]
        rows = -(-len(some) // TILES)
        full = np.zeros((rows * TILES, side, side, 3), np.uint8)
        full[: len(some)] = some
        yield full.reshape(rows, TILES, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, TILES * side, 3)


def webp(mosaic: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(mosaic).save(file, "WEBP", lossless=True, quality=100, method=4)
    return np.frombuffer(file.getvalue(), np.uint8)


def untiled(side: int, data: np.ndarray) -> np.ndarray:
    """The images [N, side, side, 3] of a mosaic's file."""
    mosaic = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    rows, columns = mosaic.shape[0] // side, mosaic.shape[1] // side
    return mosaic.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)


def digests(dataset: sources.Dataset) -> dict[str, str]:
    return {
        f"{split} {key}": hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        for split in ("train", "test")
        for key, array in getattr(dataset, split).items()
    }


if __name__ == "__main__":
    main()

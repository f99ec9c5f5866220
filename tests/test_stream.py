"""Streams of real files: their order, their workers, and what becomes of damage."""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image

from experiments import imagenet_resnet50
from jaxcompute import log, sharding, train
from jaxcompute.data import augment, order, sources, stream
from jaxcompute.errors import BadInput
from jaxcompute.models.mlp import MLP

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = "downloads/hymenoptera"


@pytest.fixture(scope="module")
def workers():
    """Two processes that the tests share."""
    with stream_of(2) as shared:
        yield shared


class stream_of:
    def __init__(self, count: int):
        self.workers = stream.Workers(count)

    def __enter__(self) -> stream.Workers:
        return self.workers

    def __exit__(self, *_: object) -> None:
        self.workers.close()


def colour(i: int) -> tuple[int, int, int]:
    return 10 * i, 255 - 10 * i, 100


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> sources.Files:
    """Thirteen images, each of its own colour, shape and class."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(13):
        (root / f"{i:02d}").mkdir()
        Image.new("RGB", (20 + i, 33 - i), colour(i)).save(root / f"{i:02d}/a.png")
    return sources.files(root, root)[0]


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_what_the_order_says_and_each_image_lies_in_its_canvas(pictures, workers):
    source = stream.shuffled(pictures, 5, 7, stream.whole(24), workers)
    for step in (0, 1, 2, 9):
        batch = source.feed(step)
        rows = order.indices(7, step, 5, 13, np)
        np.testing.assert_array_equal(batch["label"], rows)
        for image, (height, width), i in zip(batch["image"], batch["size"], rows, strict=True):
            scale = min(1, 24 / max(20 + i, 33 - i))
            assert abs(height - (33 - i) * scale) <= 0.5 and abs(width - (20 + i) * scale) <= 0.5
            assert (image[:height, :width] == colour(i)).all()
            assert not image[height:].any() and not image[:, width:].any()
    like = source.like()
    assert {k: (v.shape, v.dtype) for k, v in like.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


def test_no_step_needs_one_before_it(pictures, workers, tmp_path):
    """A reader that begins at step 40 reads the files of steps 40 and 41 and no other: the rest are gone."""
    unbroken = stream.shuffled(pictures, 2, 3, stream.whole(16), workers)
    wanted = [unbroken.feed(step) for step in range(44)][40:42]
    needed = {int(i) for step in (40, 41) for i in order.indices(3, step, 2, 13, np)}
    paths = [path if i in needed else str(tmp_path / "gone") for i, path in enumerate(pictures.paths)]
    alone = stream.shuffled(dataclasses.replace(pictures, paths=paths), 2, 3, stream.whole(16), workers)
    same(alone.feed(40), wanted[0])
    same(alone.feed(41), wanted[1])
    with pytest.raises(BadInput, match="gone cannot be read"):
        for step in range(7):
            alone.feed(step)


def test_the_number_of_workers_and_what_was_asked_before_change_no_bit(pictures, workers):
    steps = (0, 1, 5, 4, 4, 9)
    two = stream.shuffled(pictures, 8, 1, stream.whole(40), workers)
    with stream_of(1) as alone, stream_of(5) as five:
        one, many = (dataclasses.replace(two, workers=other) for other in (alone, five))
        for step in steps:
            batch = two.feed(step)
            same(batch, one.feed(step))
            same(batch, many.feed(step))


@pytest.mark.parametrize("seed", [4, None])
@pytest.mark.parametrize("step", [0, 1])
def test_hosts_share_a_batch_in_equal_parts_one_after_the_other(pictures, workers, seed, step):
    source = stream.Stream(pictures, 8, seed, stream.whole(16), workers)
    batch = source.feed(step)
    parts = [source.feed(step, index, 4) for index in range(4)]
    same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)


@pytest.mark.parametrize("batch_size", [4, 13, 20])
def test_in_order_holds_every_example_once(pictures, workers, batch_size):
    source = stream.in_order(pictures, batch_size, stream.centre(10, 12), workers)
    batches = [source.feed(step) for step in range(source.steps)]
    assert all(batch["image"].shape == (batch_size, 10, 10, 3) for batch in batches)
    kept = {name: np.concatenate([batch[name][batch["mask"]] for batch in batches]) for name in ("label", "image")}
    assert kept["label"].tolist() == list(range(13))
    assert all((image == colour(i)).all() for i, image in enumerate(kept["image"]))


def test_a_crop_of_a_canvas_is_that_of_the_picture_in_it():
    """The box is drawn within the picture, and the padding around it takes no part."""
    picture = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
    canvas = np.full((40, 40, 3), 255, np.uint8)
    canvas[:21, :34] = picture
    cut = jax.jit(lambda key, image, within: augment.random_resized_crop(key, image, 9, (0.1, 1), within=within))
    plain = jax.jit(lambda key, image: augment.random_resized_crop(key, image, 9, (0.1, 1)))
    for key in jax.random.split(jax.random.key(0), 8):
        within = np.array(picture.shape[:2], np.int32)
        np.testing.assert_allclose(cut(key, canvas, within), plain(key, picture), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncated, "(?i:truncated)"),
        (animated, "it is animated"),
        (lambda path: Image.new("1", (10_000, 10_000)).save(path, "PNG"), "pixels"),
        (lambda path: Image.fromarray(np.zeros((9, 9), np.uint16)).save(path, "PNG"), "more than 8 bits"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.unlink(), "No such file"),
        (os.mkfifo, "it is no file"),
    ],
)
def test_damage_is_one_line_that_names_the_file(workers, tmp_path, spoil, message):
    (tmp_path / "a").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / "a" / name)
    files = sources.files(tmp_path, tmp_path)[0]
    bad = tmp_path / "a/1.png"
    bad.unlink()
    if spoil is not os.unlink:
        bad.touch()
    if spoil is os.mkfifo:
        bad.unlink()
    spoil(bad)
    source = stream.in_order(files, 1, stream.centre(8, 8), workers)
    assert source.feed(0)["mask"].all()  # though the damage lies ahead
    with pytest.raises(
        BadInput, match=f"{re.escape(str(bad))} cannot be read as one image: .*{message}.*; mend"
    ) as told:
        source.feed(1)
    assert "\n" not in str(told.value)
    assert source.feed(0)["mask"].all()  # and the workers live


def test_grey_and_cmyk_become_rgb(workers, tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (9, 9), 50).save(tmp_path / "a/0.jpg", quality=95)
    Image.new("RGB", (9, 9), (200, 30, 90)).convert("CMYK").save(tmp_path / "a/1.jpg", quality=95)
    source = stream.in_order(sources.files(tmp_path, tmp_path)[0], 2, stream.whole(9), workers)
    np.testing.assert_allclose(source.feed(0)["image"][:, 4, 4], [(50, 50, 50), (200, 30, 90)], atol=8)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_killed_worker_ends_the_run_in_one_line_and_leaves_no_process(pictures, tmp_path):
    with stream_of(2) as workers:
        exp = streamed(pictures, workers, steps=200, log_every=10)
        pids: list[int] = []

        def kill(at: int, values: dict) -> None:
            if not pids:
                pids.extend(process.pid for process in workers.processes)
                os.kill(pids[0], signal.SIGKILL)

        with pytest.raises(OSError, match=r"the data worker \d+ was killed by SIGKILL") as told:
            train.fit(exp, tmp_path / "run", write=kill, say=lambda text: None)
        assert "\n" not in str(told.value)
        assert log.read_status(tmp_path / "run")["state"] == "failed"
        assert len(pids) == 2 and all(map(ended, pids))


def test_no_worker_outlives_a_parent_that_is_killed(pictures, tmp_path):
    script = f"""
import os, signal
from jaxcompute.data import sources, stream
workers = stream.Workers(2)
source = stream.shuffled(sources.Files({pictures.paths!r}, list(range(13))), 8, 0, stream.whole(300), workers)
source.feed(0)
print(*[process.pid for process in workers.processes], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stderr == ""
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and all(map(ended, pids))


def test_workers_end_with_whoever_holds_them_and_start_again(pictures):
    workers = stream.Workers(1)
    source = stream.shuffled(pictures, 2, 0, stream.whole(8), workers)
    assert not workers.processes  # none before they are needed
    source.feed(0)
    first = workers.processes[0].pid
    source.close()
    assert ended(first)
    source.feed(0)
    second = workers.processes[0].pid
    assert second != first
    del source, workers
    assert ended(second)


def test_neither_ctrl_c_nor_a_cluster_that_stops_the_job_ends_a_worker(pictures):
    with stream_of(1) as workers:
        source = stream.shuffled(pictures, 2, 0, stream.whole(8), workers)
        source.feed(0)
        pid = workers.processes[0].pid
        assert os.getsid(pid) == pid  # out of the terminal's reach
        for signum in (signal.SIGTERM, signal.SIGUSR1):  # of a cluster
            os.kill(pid, signum)
        source.feed(5)
        assert workers.processes[0].pid == pid


# ----------------------------------------------------------------------------------------------------------------------
# In the loop


def streamed(records: sources.Files, workers: stream.Workers, **fields):
    """tiny.mlp on streams of 16 pixels, cropped and flipped on the device."""
    exp = tiny.mlp(**({"batch_size": 4, "mesh_data": 2} | fields))

    def prepare(batch, key, train):
        image = batch["image"]
        if train:
            image = augment.per_example(
                key, image, lambda k, x, size: augment.random_resized_crop(k, x, 16, within=size), batch["size"]
            )
        return batch | {"image": augment.normalize(image, (0.5,) * 3, (0.3,) * 3), "label": batch["label"] % 3}

    return dataclasses.replace(
        exp,
        train=stream.shuffled(records, exp.config.batch_size, exp.config.seed, stream.whole(24), workers),
        eval=stream.in_order(records, 5, stream.centre(16, 18), workers),
        prepare=prepare,
        classes=(),  # of `prepare`, not of the records
    )


def test_a_run_that_goes_on_has_the_bits_of_the_unbroken_one(pictures, workers, tmp_path):
    class Stop(Exception):
        pass

    def stop(at: int, values: dict) -> None:
        if at >= 7:
            raise Stop

    fields = {"steps": 9, "eval_every": 3, "log_every": 2}
    quiet = {"say": lambda text: None}
    unbroken = train.fit(streamed(pictures, workers, **fields), tmp_path / "whole", **quiet)
    with pytest.raises(Stop):
        train.fit(streamed(pictures, workers, **fields), tmp_path / "run", write=stop, **quiet)
    went_on = train.fit(streamed(pictures, workers, **fields), tmp_path / "run", **quiet)
    for a, b in zip(jax.tree.leaves(unbroken), jax.tree.leaves(went_on), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    runs = [log.read(tmp_path / name) for name in ("whole", "run")]
    for tag in ("train/loss", "eval/loss", "eval/accuracy"):
        values = [{step: row[tag] for step, row in run.items() if tag in row} for run in runs]
        assert values[0] == values[1] and values[0]
    assert not workers.processes  # the run has ended them


def test_damage_in_the_middle_of_a_run_is_told_and_the_run_has_failed(pictures, workers, tmp_path):
    spoilt = dataclasses.replace(pictures, paths=[*pictures.paths[:-1], str(tmp_path / "spoilt.png")])
    exp = dataclasses.replace(streamed(pictures, workers), eval=streamed(spoilt, workers).eval)
    with pytest.raises(BadInput, match=r"spoilt\.png cannot be read: No such file.*; mend"):
        train.fit(exp, tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run").exists()  # told before it begins
    (tmp_path / "spoilt.png").touch()
    with pytest.raises(BadInput, match=r"spoilt\.png cannot be read as one image"):
        train.fit(exp, tmp_path / "run", say=lambda text: None)
    assert log.read_status(tmp_path / "run")["state"] == "failed"


def test_a_picture_replaced_under_its_name_makes_another_set(pictures, tmp_path):
    shutil.copytree(Path(pictures.paths[0]).parents[1], tmp_path / "copy")
    copy = sources.files(tmp_path / "copy", tmp_path / "copy")[0]
    assert copy.identity() == pictures.identity()
    Image.new("RGB", (99, 99)).save(copy.paths[5])
    assert copy.identity() != pictures.identity()


@pytest.mark.parametrize(("split", "shift", "wrong"), [("train", -1, -1), ("train", 1, 13), ("eval", -1, -1)])
def test_a_label_out_of_range_is_told_at_the_step_that_meets_it(split, shift, wrong, pictures, workers):
    spoiled = streamed(dataclasses.replace(pictures, label=pictures.label + np.int32(shift)), workers)
    exp = dataclasses.replace(streamed(pictures, workers), classes=tuple("abcdefghijklm"))
    exp = dataclasses.replace(exp, **{split: getattr(spoiled, split)})
    at = 0  # the first of the evaluation's is example 0
    if split == "train":
        spoilt = 0 if shift < 0 else 12
        at = next(step for step in range(4) if spoilt in order.indices(exp.config.seed, step, 4, 13, np))
    with pytest.raises(BadInput, match=f"^{split}: step {at}: a label is {wrong} and there are 13 classes; count"):
        train.fit(exp, say=lambda text: None)


def test_steps_in_one_call_are_refused(pictures, workers):
    with pytest.raises(BadInput, match=r"steps_per_call=2: .*give 1"):
        train.fit(streamed(pictures, workers, steps_per_call=2))


@dataclasses.dataclass(frozen=True)
class Counted(stream.Stream):
    """Notes what it is asked for."""

    asked: list = dataclasses.field(default_factory=list)

    def feed(self, step: int, index: int = 0, count: int = 1):
        self.asked.append(step)
        return {name: np.array(array) for name, array in self.like().items()}


def test_the_thread_reads_a_bounded_number_of_batches_ahead_and_follows_a_jump(pictures, workers):
    source = Counted(pictures, 4, 0, stream.whole(8), workers)
    mesh = sharding.make_mesh(tiny.mlp(mesh_data=2).config)
    feed = train.Feeder(mesh, source, 9)
    for at, asked in (0, [0, 1, 2]), (1, [3]), (6, [6, 7, 8]), (7, []), (8, []):
        source.asked.clear()
        feed(at)
        feed.thread.submit(int).result()  # after all that was begun
        assert source.asked == asked
    feed.close()


def test_no_more_calls_are_dispatched_than_the_device_keeps_up_with():
    class Output:
        def __init__(self, i: int):
            self.i = i

        def block_until_ready(self):
            waited.append(self.i)
            return self

    waited: list[int] = []
    call = train.paced(lambda i: ("state", Output(i)))
    for i in range(5):
        assert call(i)[0] == "state"
        assert waited == list(range(max(0, i + 1 - train.AHEAD)))


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def archives(data_dir, tmp_path, monkeypatch):
    """ImageNet's two archives in small: photographs of ants and bees under two synsets, one of them as CMYK."""
    ants, bees = (sorted((data_dir / PHOTOGRAPHS / "train" / name).glob("*.jpg")) for name in ("ants", "bees"))
    cmyk = io.BytesIO()
    Image.open(ants[0]).convert("CMYK").save(cmyk, "JPEG")
    train = {
        "n02219486.tar": tarred({f"n02219486_{i}.JPEG": path.read_bytes() for i, path in enumerate(ants[:5])}),
        "n02206856.tar": tarred(
            {f"n02206856_{i}.JPEG": path.read_bytes() for i, path in enumerate(bees[:4])}
            | {"n02206856_9.JPEG": cmyk.getvalue()}
        ),
    }
    home = Path(tfds.builder_cls("imagenet2012").code_path).parent
    published = (home / "validation_labels.txt").read_text().split()  # of val images 1, 2, ...
    places = {name: published.index(name) + 1 for name in ("n02219486", "n02206856")}
    val = {
        f"ILSVRC2012_val_{places['n02219486']:08d}.JPEG": ants[6].read_bytes(),
        f"ILSVRC2012_val_{places['n02206856']:08d}.JPEG": bees[6].read_bytes(),
    }
    manual = tmp_path / "downloads/manual"
    manual.mkdir(parents=True)
    (manual / "ILSVRC2012_img_train.tar").write_bytes(tarred(train))
    (manual / "ILSVRC2012_img_val.tar").write_bytes(tarred(val))
    monkeypatch.setattr(sources, "IMAGENET", {"train": 10, "validation": 2})
    monkeypatch.setenv("JAXCOMPUTE_DATA_DIR", str(tmp_path))
    return manual


def test_imagenet_by_its_stock_name_from_its_archives(archives, tmp_path, capfd):
    exp = imagenet_resnet50.experiment(
        imagenet_resnet50.Config(
            batch_size=4, steps=2, workers=2, canvas=64, image_size=16, eval_short=18, eval_size=16, mesh_data=1
        )
    )
    assert capfd.readouterr().err.startswith(f"preparing imagenet2012 in {tmp_path}, once")
    (tmp_path / "downloads").rename(tmp_path / "away")
    assert sources.prepared("imagenet2012")[1] == exp.classes and len(exp.classes) == 1000  # and nothing is done again
    assert "preparing" not in capfd.readouterr().err
    assert (exp.train.size, exp.eval.size) == (10, 2)

    stock = tfds.data_source("imagenet2012", split="train", data_dir=tmp_path, download=False)
    names = [exp.classes[example["label"]] for example in stock]
    assert sorted(names) == ["n02206856"] * 5 + ["n02219486"] * 5
    assert all(example["file_name"].decode().startswith(name) for example, name in zip(stock, names, strict=True))
    with contextlib.closing(exp.train):
        batch = exp.train.feed(1)
        rows = order.indices(exp.config.seed, 1, 4, 10, np)
        assert [exp.classes[label] for label in batch["label"]] == [names[i] for i in rows]
        for image, (height, width), i in zip(batch["image"], batch["size"], rows, strict=True):
            whole = Image.fromarray(stock[int(i)]["image"]).resize((width, height), Image.Resampling.BILINEAR)
            assert max(height, width) == 64
            # a JPEG that is decoded at a half or a quarter differs a little
            assert np.abs(image[:height, :width].astype(int) - np.asarray(whole)).mean() < 4
        evaluated = exp.eval.feed(0)
        held_out = [exp.classes[label] for label in evaluated["label"][evaluated["mask"]]]
        assert sorted(held_out) == ["n02206856", "n02219486"]

    small = dataclasses.replace(exp, model=MLP((8,), 1000))
    seen: dict[str, float] = {}
    state = train.fit(small, write=lambda at, values: seen.update(values), say=lambda text: None)
    assert int(state.step) == 2 and np.isfinite(seen["eval/loss"])


def test_archives_that_are_missing_or_cut_short_are_named_and_nothing_half_prepared_stays(archives, tmp_path):
    train_tar, val_tar = archives / "ILSVRC2012_img_train.tar", archives / "ILSVRC2012_img_val.tar"
    whole = train_tar.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "unexpected end of data"),
        (tarred({"n02219486.tar": tarred({"n02219486_0.JPEG": b"no"})}), "its n02219486_0.JPEG is no image"),
        (tarred({}), "it holds 0 images, not 10"),
    ):
        train_tar.write_bytes(content)
        with pytest.raises(BadInput, match=f"{train_tar} is damaged or cut short: {message}"):
            sources.prepared("imagenet2012")
        assert not list((tmp_path / "imagenet2012").glob("*"))
    val_tar.unlink()
    with pytest.raises(BadInput, match=r"ILSVRC2012_img_val\.tar not found in .*image-net.org"):
        sources.prepared("imagenet2012")


def test_a_prepared_set_that_cannot_be_read_by_index_is_told(archives, tmp_path, workers):
    splits, _ = sources.prepared("imagenet2012")
    source = stream.in_order(splits["validation"], 1, stream.centre(8, 8), workers)
    info = Path(splits["train"].folder) / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(BadInput, match="is stored as tfrecord; move it away and prepare it as array_record"):
        sources.prepared("imagenet2012")
    info.write_text(text[: len(text) // 2])
    with pytest.raises(BadInput, match=r"5\.1\.0 is damaged: .*; move it away"):
        sources.prepared("imagenet2012")
    info.write_text(text)
    (record,) = Path(splits["train"].folder).glob("*validation.array_record*")
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 1
    was = source.identity()
    record.write_bytes(data + b"more")
    assert source.identity() != was
    record.write_bytes(data)
    assert source.identity() == was  # by size alone
    with pytest.raises(BadInput, match=r"5\.1\.0: example [01] of validation is damaged: .*; move the folder away"):
        for step in range(source.steps):
            source.feed(step)
    with pytest.raises(BadInput, match="holds no prepared set; prepare imagenet_v9 there"):
        sources.prepared("imagenet_v9")

"""A hundred and more wrong inputs: each is one line with what, where and the mend, exit code 2, and leaves no trace."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DIGITS = "--experiment=digits_cnn "
XOR = "--experiment=sigmoid_mlp "
IMAGENET = "--experiment=imagenet_resnet50 --data_dir=none "
FOLDER = "--experiment=folder_cnn --config.train_dir=train --config.eval_dir=eval "
RESNET = "--experiment=cifar_resnet "  # no CIFAR is needed to refuse it

Spoil = Callable[[Path], object]  # makes the working folder what the case needs


def picture(path: Path, size: tuple[int, int] = (12, 12), **save: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 90)).save(path, **save)


def folders(here: Path) -> Path:
    """train/ and eval/ of two classes; returns train."""
    for part in ("train", "eval"):
        for name in ("cat", "dog"):
            picture(here / part / name / "a.png")
    return here / "train"


def spoiled(path: str, content: bytes | None = None) -> Spoil:
    """The folders with a file in place; content None: removed."""

    def spoil(here: Path) -> None:
        folders(here)
        if content is None:
            (here / path).unlink()
        else:
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            (here / path).write_bytes(content)

    return spoil


def animated(here: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folders(here) / "dog/b.webp", save_all=True, append_images=frames[1:])


def cut_short(here: Path) -> None:
    picture(folders(here) / "dog/b.jpg", (64, 64))
    data = (here / "train/dog/b.jpg").read_bytes()
    (here / "train/dog/b.jpg").write_bytes(data[:-200])


def text(path: str, content: str = "") -> Spoil:
    """A file in the working folder."""

    def spoil(here: Path) -> None:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(content)

    return spoil


def edit_json(path: str, **values: object) -> Spoil:
    """Keys of a JSON file of the run changed; a value of None takes the key away."""

    def spoil(here: Path) -> None:
        content = json.loads((here / path).read_text())
        for key, value in values.items():
            content.pop(key) if value is None else content.update({key: value})
        (here / path).write_text(json.dumps(content))

    return spoil


def edit_config(**values: object) -> Spoil:
    def spoil(here: Path) -> None:
        config = json.loads((here / "run/config.json").read_text())["config"]
        edit_json("run/config.json", config={**config, **values})(here)

    return spoil


def each_checkpoint(change: Callable[[Path], object]) -> Spoil:
    def spoil(here: Path) -> None:
        for step in (here / "run/checkpoints").iterdir():
            change(step)

    return spoil


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def without_config(here: Path) -> None:
    (here / "run/config.json").unlink()


def replaced(path: str, by: Callable[[Path], object]) -> Spoil:
    """What stood there is gone, and something else stands in its place."""

    def spoil(here: Path) -> None:
        there = here / path
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        by(there)

    return spoil


# flags, what the line must say, and what is done to the folder first
NAMES = [
    ("", "--experiment=NAME digits_cnn cifar_resnet"),
    ("--experiment=", "--experiment=NAME digits_cnn"),
    ("--experiment", "--experiment needs a value"),
    ("--experiment=digit_cnn", "'digit_cnn' (did you mean digits_cnn?) mnist_lenet"),
    ("--experiment=../launch", "'../launch' digits_cnn"),
    ("--experiment=experiments/digits_cnn", "'experiments/digits_cnn' digits_cnn"),
    ("--experiment=experiments.digits_cnn", "'experiments.digits_cnn' digits_cnn"),
    ("--experiment=digits_cnn.py", "'digits_cnn.py' digits_cnn"),
    ("--experiment=/etc/passwd", "'/etc/passwd' digits_cnn"),
    ("--experiment=.", "'.' digits_cnn"),
    ("--experiment=..", "'..' digits_cnn"),
    ("--experiment=__init__", "'__init__' digits_cnn"),
    ("--experiment=zïffern", "'zïffern' digits_cnn"),
    ("--experiment='digits cnn'", "'digits cnn' digits_cnn"),
    ("--experiment='a\nb'", r"'a\nb' digits_cnn"),
    ("--experiment=evil", "'evil' digits_cnn", text("evil.py", "raise SystemExit('executed')")),
]
FLAGS = [
    (DIGITS + "--mode=fly", "--mode=fly train evaluate"),
    (DIGITS + "--mode=", "--mode= train evaluate"),
    (DIGITS + "--mode=evaluate", "--mode=evaluate --workdir=DIR"),
    (DIGITS + "--inference", "--mode=train --inference --mode=benchmark"),
    (DIGITS + "train", "'train' --name=value"),
    (DIGITS + "-- train", "'train' --name=value"),
    (DIGITS + "--speed=1", "--speed"),
    (DIGITS + "'--spe\ned=1'", "--spe"),
    (DIGITS + "--learning_rate=1", "--learning_rate (did you mean --config.learning_rate?)"),
    (DIGITS + "--config.learning_rat=1", "--config.learning_rat (did you mean --config.learning_rate?)"),
    (DIGITS + "--config.epochs", "--config.epochs value"),
    (XOR + "--config.dropout=0.1", "--config.dropout"),
    ("--flagfile=nowhere", "flagfile nowhere"),
    ("--flagfile=", "--experiment=NAME digits_cnn"),
    ("--flagfile=there", "flagfile there", lambda here: (here / "there").mkdir()),
    ("--flagfile=wrong", "--config.seed=x an integer", text("wrong", DIGITS + "\n--config.seed=x\n")),
    ("--flagfile=wrong", "--config.sed (did you mean", text("wrong", DIGITS + "\n--config.sed=1\n")),
    ("--flagfile=binary", "flagfile binary", lambda here: (here / "binary").write_bytes(b"\xff\xfe\x00--seed")),
]
VALUES = [
    (DIGITS + "--config.seed=-1", "--config.seed=-1 at least 0"),
    (DIGITS + "--config.seed=4294967296", "--config.seed=4294967296 below 4294967296"),
    (DIGITS + "--config.seed=3.5", "--config.seed=3.5 an integer"),
    (DIGITS + "--config.seed=", "--config.seed= an integer"),
    (DIGITS + "--config.seed=0x10", "--config.seed=0x10 an integer"),
    (DIGITS + f"--config.seed={'9' * 5000}", "--config.seed an integer"),
    (DIGITS + "'--config.seed=1\n2'", "--config.seed an integer"),
    (DIGITS + "--config.precision=half", "--config.precision=half bfloat16"),
    (DIGITS + "--config.precision=", "--config.precision= bfloat16"),
    (DIGITS + "--config.batch_size=0", "--config.batch_size=0 at least 1"),
    (DIGITS + "--config.batch_size=-8", "--config.batch_size=-8 at least 1"),
    (DIGITS + "--config.batch_size=1.5", "--config.batch_size=1.5 an integer"),
    (DIGITS + "--config.batch_size=99999999999", "--config.batch_size=99999999999 below"),
    (DIGITS + "--config.epochs=0", "--config.epochs=0 above 0"),
    (DIGITS + "--config.epochs=-1", "--config.epochs=-1 above 0"),
    (DIGITS + "--config.epochs=nan", "--config.epochs=nan a finite number"),
    (DIGITS + "--config.epochs=inf", "--config.epochs=inf a finite number"),
    (DIGITS + "--config.epochs=1e999", "--config.epochs=1e999 a finite number"),
    (DIGITS + "--config.epochs=1e300", "--config.epochs=1e300 below"),
    (DIGITS + "--config.epochs=many", "--config.epochs=many a finite number"),
    (DIGITS + "--config.steps=-1", "--config.steps=-1 at least 0"),
    (DIGITS + "--config.steps=1000000000000", "--config.steps=1000000000000 below"),
    (DIGITS + "--config.accumulate=0", "--config.accumulate=0 at least 1"),
    (DIGITS + "--config.accumulate=3", "--config.batch_size=128 --config.accumulate=3 multiple"),
    (DIGITS + "--config.clip_norm=-1", "--config.clip_norm=-1 at least 0"),
    (DIGITS + "--config.ema=1", "--config.ema=1 below 1"),
    (DIGITS + "--config.ema=-0.1", "--config.ema=-0.1 at least 0"),
    (DIGITS + "--config.ema=nan", "--config.ema=nan a finite number"),
    (DIGITS + "--config.log_every=0", "--config.log_every=0 at least 1"),
    (DIGITS + "--config.log_every=-5", "--config.log_every=-5 at least 1"),
    (DIGITS + "--config.eval_every=-1", "--config.eval_every=-1 at least 0"),
    (DIGITS + "--config.save_every=-1", "--config.save_every=-1 at least 0"),
    (DIGITS + "--config.keep_last=0", "--config.keep_last=0 at least 1"),
    (DIGITS + "--config.keep_best=-1", "--config.keep_best=-1 at least 0"),
    (DIGITS + "--config.steps_per_call=-1", "--config.steps_per_call=-1 at least 0"),
    (DIGITS + "--config.steps_per_call=1000000000000", "--config.steps_per_call=1000000000000 at most"),
    (DIGITS + "--config.learning_rate=-1", "--config.learning_rate=-1 at least 0"),
    (DIGITS + "--config.weight_decay=-1", "--config.weight_decay=-1 at least 0"),
    (DIGITS + "--config.dropout=1", "--config.dropout=1 below 1"),
    (DIGITS + "--config.dropout=-0.1", "--config.dropout=-0.1 at least 0"),
    (DIGITS + "--config.features=0", "--config.features=0 at least 1"),
    (DIGITS + "--config.features=32,,64", "--config.features=32,,64 an integer"),
    (DIGITS + "--config.features=a", "--config.features=a an integer"),
    (DIGITS + "--config.features=8,8,8,8", "--config.features=8,8,8,8 3"),
    (DIGITS + "--config.dense=-1", "--config.dense=-1 at least 1"),
    (RESNET + "--config.depth=19", "--config.depth=19 20 110"),
    (RESNET + "--config.momentum=1", "--config.momentum=1 below 1"),
    (RESNET + "--config.label_smoothing=1", "--config.label_smoothing=1 below 1"),
    (RESNET + "--config.warmup_epochs=-1", "--config.warmup_epochs=-1 at least 0"),
    (RESNET + "--config.warmup_epochs=11", "--config.warmup_epochs=11 --config.epochs=10"),
    (RESNET + "--config.padding=-1", "--config.padding=-1 at least 0"),
    (RESNET + "--config.padding=33", "--config.padding=33 at most 32"),
    ("--experiment=cifar_cnn --config.features=1,1,1,1,1,1", "--config.features=1,1,1,1,1,1 5"),
]
DEVICES = [
    (DIGITS + "--config.mesh_data=0", "--config.mesh_data=0 devices -1"),
    (DIGITS + "--config.mesh_data=-2", "--config.mesh_data=-2 at least -1"),
    (DIGITS + "--config.mesh_data=64", "--config.mesh_data=64 needs 64 devices there are 1"),
    (DIGITS + "--config.mesh_fsdp=3", "mesh_fsdp=3 needs 3 devices there are 1"),
    (DIGITS + "--config.mesh_fsdp=-1", "--config.mesh_data=-1 --config.mesh_fsdp=-1 only one"),
    (RESNET + "--config.mesh_data=64", "--config.mesh_data=64 there are 1"),
    (RESNET + "--config.accumulate=5", "--config.batch_size=64 --config.accumulate=5 multiple"),
]
IMAGES = [
    ("--experiment=folder_cnn", "--config.train_dir missing folder"),
    ("--experiment=folder_cnn --config.train_dir=train", "--config.eval_dir missing", folders),
    (FOLDER, "'train' is no folder"),
    (FOLDER, "'train' is no folder", text("train")),
    (FOLDER, "train has no class folders", lambda here: (here / "train").mkdir()),
    (FOLDER, "dog holds no images .png", spoiled("train/dog/a.png")),
    (FOLDER, "train eval differ wolf", spoiled("train/wolf/a.png", b"")),
    (FOLDER, "train/dog/b.png cannot be read", spoiled("train/dog/b.png", b"no image")),
    (FOLDER, "train/dog/b.png cannot be read", spoiled("train/dog/b.png", b"")),
    (FOLDER, "eval/cat/b.jpg cannot be read", spoiled("eval/cat/b.jpg", b"\xff\xd8\xff\xe0")),
    (FOLDER, "train/dog/b.jpg cannot be read Truncated mend or remove", cut_short),
    (FOLDER, "train/dog/b.webp animated", animated),
    (FOLDER, "dog/b.png pixels", lambda h: Image.new("1", (10_000, 10_000)).save(folders(h) / "dog/b.png")),
    (FOLDER, "b.png 8 bits", lambda h: Image.fromarray(np.zeros((9, 9), np.uint16)).save(folders(h) / "cat/b.png")),
    (FOLDER, "dog/b.png cannot be read", lambda here: (folders(here) / "dog/b.png").symlink_to("b.png")),
    (FOLDER, "dog/b.png cannot be read", lambda here: (folders(here) / "dog/b.png").mkdir()),
    (FOLDER + "--config.image_size=97", "--config.image_size=97 --config.decode_size=96", folders),
    (FOLDER + "--config.image_size=8", "--config.image_size=8 --config.features", folders),
    (FOLDER + "--config.decode_size=0", "--config.decode_size=0 at least 1", folders),
    (FOLDER + "--config.decode_size=99999999", "--config.decode_size=99999999 at most", folders),
    (IMAGENET, "imagenet2012 ILSVRC2012_img_train.tar not found downloads/manual image-net.org"),
    (IMAGENET + "--config.train_dir=train", "--config.eval_dir missing", folders),
    (IMAGENET + "--config.eval_size=300", "--config.eval_size=300 --config.eval_short=256"),
    (IMAGENET + "--config.warmup_epochs=91", "--config.warmup_epochs=91.0 --config.epochs=90.0"),
    (IMAGENET + "--config.train_dir=train --config.eval_dir=eval", "'train' is no folder"),
]
PATHS = [
    (XOR + "--workdir=file", "--workdir=file folder", text("file")),
    (XOR + "--workdir=file/run", "--workdir=file/run folder", text("file")),
    (XOR + "--workdir=/proc/run", "--workdir=/proc/run folder"),
    (XOR + f"--workdir={'w' * 300}", "--workdir=www too long folder"),
    (XOR + "'--workdir=fi\nle/run'", "--workdir=fi folder", text("fi\nle")),
    (XOR + "--workdir=loop", "--workdir=loop folder", lambda here: (here / "loop").symlink_to("loop")),
    (XOR + "--mode=evaluate --workdir=nowhere", "no checkpoint nowhere train first"),
    (XOR + "--mode=evaluate --workdir=file", "file", text("file")),
    ("--experiment=mnist_lenet --data_dir=file", "file is no folder --data_dir", text("file")),
    ("--experiment=mnist_lenet --data_dir=nowhere", "mnist train-images nowhere no network digits_cnn"),
    ("--experiment=cifar_cnn --data_dir=/proc/data", "cifar10 /proc/data"),
]
RUN = XOR + "--workdir=run "
WORKDIRS = [  # of a run that ended at step 4, with checkpoints of steps 2 and 4
    (RUN + "--config.seed=9", "run another config seed was 1 is 9 --workdir"),
    (RUN + "--config.batch_size=2 --config.ema=0.5", "batch_size was 4 is 2 ema was 0.0 is 0.5"),
    (RUN + "--config.precision=float64", "precision was float32 is float64 take another"),
    (RUN + "--config.log_every=1", "log_every was 2 is 1 --allow_changes"),
    ("--experiment=digits_mlp --workdir=run", "run/config.json"),
    ("--experiment=mnist_lenet --workdir=run", "run/config.json sigmoid_mlp mnist_lenet"),
    (RUN, "run/config.json", text("run/config.json")),
    (RUN, "run/config.json", text("run/config.json", "rubbish")),
    (RUN, "run/config.json", text("run/config.json", '{"config": {"seed": 0, "prec')),
    (RUN, "run/config.json", text("run/config.json", "[]")),
    (RUN, "run/config.json", text("run/config.json", "{}")),
    (RUN, "run/config.json", lambda here: (here / "run/config.json").write_bytes(b"\xff\x00")),
    (RUN, "run/config.json", edit_json("run/config.json", config=[1, 2])),
    (RUN, "run/config.json", replaced("run/config.json", Path.mkdir)),
    (RUN, "run/config.json seed=x an integer", edit_config(seed="x")),
    (RUN, "run/config.json ema=2 below 1", edit_config(ema=2)),
    (RUN, "run/config.json colour", edit_config(colour=1)),
    (RUN, "run/checkpoints", replaced("run/checkpoints", Path.touch)),
    (RUN, "no whole checkpoint run/checkpoints copy", each_checkpoint(lambda s: flip(s / "manifest.json"))),
    (
        RUN,
        "no whole checkpoint run/checkpoints copy",
        each_checkpoint(lambda s: (s / "manifest.json").write_text("{}")),
    ),
    (RUN, "no whole checkpoint run/checkpoints copy", each_checkpoint(lambda s: shutil.rmtree(s / "state"))),
    (
        RUN + "--mode=evaluate",
        "checkpoints/4 damaged manifest.json",
        each_checkpoint(lambda s: flip(s / "manifest.json")),
    ),
    (RUN + "--mode=evaluate", "no checkpoint run/checkpoints", replaced("run/checkpoints", Path.mkdir)),
    (
        RUN + "--mode=evaluate",
        "no whole checkpoint manifest.json gone",
        each_checkpoint(lambda step: (step / "manifest.json").unlink()),
    ),
    (RUN + "--config.ema=0.5", "step 4 no config.json bring", without_config),
    ("--experiment=digits_mlp --workdir=run", "step 4 no config.json bring", without_config),
    (RUN, "step 4 checkpoints gone bring", lambda here: shutil.rmtree(here / "run/checkpoints")),
    (RUN, "run/checkpoints cannot be read", replaced("run/checkpoints", lambda at: at.symlink_to("unmounted"))),
    (RUN.replace("=run", "=mine"), "mine metrics.jsonl no config.json", text("mine/metrics.jsonl", "{}")),
    (RUN.replace("=run", "=mine"), "mine events.out.tfevents.1 no run", text("mine/events.out.tfevents.1")),
    (RUN.replace("=run", f"={'a' * 300}"), "aaa too long"),
    (RUN.replace("=run", "=a\udcff"), r"a\udcff UTF-8"),
    (RUN.replace("=run", "=file --mode=benchmark"), "--workdir=file folder", text("file")),
    ("--experiment=cifar_cnn --data_dir=~nobody-here/data", "~nobody-here/data no such home"),
    (RUN.replace("=run", "=lock"), "lock Is a directory", lambda here: (here / "lock/.lock").mkdir(parents=True)),
]
SWEEPS = [
    (XOR + "--sweep=speed=1,2", "speed no field"),
    (XOR + "--sweep=seed", "--sweep=seed field=value"),
    (XOR + "--sweep=seed=", "--sweep=seed= field=value"),
    (XOR + "--sweep==1", "--sweep==1"),
    (XOR + "--sweep=", "--sweep= field=value"),
    (XOR + "--sweep=seed=1,x", "seed=x an integer"),
    (XOR + "--sweep=seed=0,-1", "seed=-1 at least 0"),
    (XOR + "--sweep=learning_rate=0.1,nan", "learning_rate=nan a finite number"),
    (XOR + "--sweep=learning_rate=0.1,0.10", "--sweep=learning_rate=0.1,0.10 twice"),
    (XOR + "--sweep=seed=1 --sweep=seed=2", "--sweep=seed=2 twice"),
    (XOR + "--sweep=precision=float32,half", "precision=half bfloat16"),
    (XOR + "--sweep=seed=1,2 --workdir=file", "--workdir=file folder", text("file")),
    (XOR + "--sweep=seed=1,2 --workdir=run --mode=evaluate", "--sweep --mode=evaluate"),
    (DIGITS + "--sweep=features=8/8/8/8,8", "features=8,8,8,8 3"),
    (FOLDER.replace("--config.train_dir=train", "--sweep=train_dir=none,train"), "'none' no folder", folders),
]
CASES = [*NAMES, *FLAGS, *VALUES, *DEVICES, *IMAGES, *PATHS, *WORKDIRS, *SWEEPS]


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory) -> Path:
    """A run that ended at step 4, as run/."""
    here = tmp_path_factory.mktemp("trained")
    flags = "--config.steps=4 --config.eval_every=2 --config.log_every=2"
    ended = launcher(*shlex.split(RUN + flags), cwd=here)
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (here / "run/checkpoints").iterdir()) == ["2", "4"]
    return here


def contents(here: Path) -> dict[str, bytes | str | None]:
    def content(path: Path) -> bytes | str | None:
        if path.is_symlink():
            return str(path.readlink())
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(here)): content(path) for path in here.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=[f"{i}: {case[0][:60]}" for i, case in enumerate(CASES)])
def test_bad_input_is_one_line_exit_code_2_and_no_trace(case, launcher, trained, tmp_path):
    flags, words, spoil = case if len(case) == 3 else (*case, lambda here: None)
    if case in WORKDIRS:
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    before = contents(tmp_path)
    offline = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    ended = launcher(*shlex.split(flags), cwd=tmp_path, **offline)
    assert ended.code == 2, ended
    assert ended.out == "", ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    for word in words.split():
        assert word in lines[0]
    assert contents(tmp_path) == before


def test_there_are_a_hundred():
    assert len({(case[0], case[1]) for case in CASES}) >= 100

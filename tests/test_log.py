import contextlib
import csv
import errno
import fcntl
import importlib.util
import io
import json
import math
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import jax
import jax.numpy as jnp
import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from jaxcompute import locks, log

ROOT = Path(__file__).parents[1]


def events(workdir: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of the TensorBoard events, in their order."""
    (file,) = workdir.glob("events.out.tfevents.*")
    data, found = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def sheet(workdir: Path) -> list[list[str]]:
    return list(csv.reader((workdir / "metrics.csv").read_text().splitlines()))


def lines(workdir: Path) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def test_three_files_say_the_same(tmp_path: Path):
    with log.writer(tmp_path, 0) as write:
        write(10, {"train/loss": 2.5})
        write(20, {"train/loss": 1.5})
        write(20, {"eval/loss": 1.25})  # a new column, in the row of its step
        write(30, {"train/loss": math.nan})
        write(30, {"eval/loss": 0.5})
        write(40, {"train/loss": math.inf})
        write(25, {"eval/loss": 0.75})  # late
        write(40, {"train/loss": 9.0})  # stands already
        expected = [
            ["step", "train/loss", "eval/loss"],
            ["10", "2.5", ""],
            ["20", "1.5", "1.25"],
            ["25", "", "0.75"],
            ["30", "nan", "0.5"],
            ["40", "inf", ""],
        ]
        assert sheet(tmp_path) == expected  # nothing waits for the close
        assert lines(tmp_path)[3:6] == [
            {"step": 30, "train/loss": None},
            {"step": 30, "eval/loss": 0.5},
            {"step": 40, "train/loss": None},
        ]
        assert [event[:2] for event in events(tmp_path)] == [
            (line["step"], tag) for line in lines(tmp_path) for tag in line if tag != "step"
        ]
    assert log.read(tmp_path)[20] == {"train/loss": 1.5, "eval/loss": 1.25}
    assert math.isnan(log.read(tmp_path)[40]["train/loss"])


def test_start_again_at_an_earlier_step(tmp_path: Path):
    with log.writer(tmp_path, 0) as write:
        for step in (10, 20, 30):
            write(step, {"train/loss": 1 / step})
        write(20, {"eval/loss": 7.0})
    when = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "metrics.jsonl").open("ab") as file:  # what kills and full disks leave
        file.write(
            b'null\n[1]\n{"step": [5], "time": 1, "a": 2}\n{"step": 6}\n\xff\x00\n{"step": 7, "time": 0, "a": "b"}\n'
        )
        file.write(b'{"step": 10, "time": 0, "train/loss": 9}\n{"step": 20, "tim')
    with log.writer(tmp_path, 20) as write:
        assert lines(tmp_path) == [
            {"step": 10, "train/loss": 1 / 10},
            {"step": 20, "train/loss": 1 / 20},
            {"step": 20, "eval/loss": 7.0},
        ]
        write(20, {"eval/loss": 7.0})  # evaluated again after the restart
        write(30, {"train/loss": 0.5})
    assert [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:3] == [
        when[0],
        when[1],
        when[3],
    ]
    assert sheet(tmp_path) == [
        ["step", "train/loss", "eval/loss"],
        ["10", "0.1", ""],
        ["20", "0.05", "7.0"],
        ["30", "0.5", ""],
    ]
    assert events(tmp_path) == [
        (10, "train/loss", pytest.approx(0.1)),
        (20, "train/loss", pytest.approx(0.05)),
        (20, "eval/loss", 7.0),
        (30, "train/loss", 0.5),
    ]


def test_killed_and_started_again_each_step_stands_once(tmp_path: Path):
    program = (
        "import sys, pathlib; from jaxcompute import log\n"
        "start = int(sys.argv[2])\n"
        "with log.writer(pathlib.Path(sys.argv[1]), start) as write:\n"
        "  for step in range(start + 1, 1_000_000):\n"
        "    write(step, {'a': step, f'b{step // 40}': 1})\n"
        "    print(step, flush=True)\n"
    )
    start = 0
    for _ in range(3):
        command = [sys.executable, "-c", program, str(tmp_path), str(start)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert child.stdout
        while int(child.stdout.readline()) < start + 80:
            pass
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.stdout.close()
        child.wait()
        assert set(range(1, int(rest[-1] if rest else start + 80))) <= set(log.read(tmp_path))  # nothing was lost
        start += 50  # the checkpoint is older than the log
    with log.writer(tmp_path, start):
        pass
    steps = list(range(1, start + 1))
    assert [line["step"] for line in lines(tmp_path)] == steps
    assert [int(row[0]) for row in sheet(tmp_path)[1:]] == steps
    assert [step for step, tag, _ in events(tmp_path) if tag == "a"] == steps


def test_without_tensorboardx_all_but_the_events_is_written_and_a_run_with_it_makes_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", {}.get)
        with log.writer(tmp_path, 0, said.append) as write:
            write(10, {"a": 0.5})
    assert said == ["tensorboardX is not installed: this run leaves no TensorBoard events; pip install tensorboardX"]
    assert lines(tmp_path) == [{"step": 10, "a": 0.5}]
    assert sheet(tmp_path) == [["step", "a"], ["10", "0.5"]]
    assert not list(tmp_path.glob("events*"))

    with log.writer(tmp_path, 10, said.append):
        pass
    assert events(tmp_path) == [(10, "a", 0.5)]
    assert len(said) == 1


def test_status_and_what_made_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert log.read_status(tmp_path) == {}
    log.status(tmp_path, "running", step=3, of=10)
    first = log.read_status(tmp_path)
    assert (first["state"], first["step"], first["of"], first["pid"]) == ("running", 3, 10, os.getpid())
    (tmp_path / "status.json").write_text(json.dumps({**first, "started": "long ago"}))
    log.status(tmp_path, "failed", step=4, of=10, message="why")
    second = log.read_status(tmp_path)
    assert (second["state"], second["started"], second["message"]) == ("failed", "long ago", "why")
    assert set(second) == {"state", "step", "of", "host", "pid", "started", "updated", "message", "digest"}
    assert os.listdir(tmp_path) == ["status.json"]  # no part is left

    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.setattr(sys, "argv", ["launch.py", "--experiment=x"])
    told = json.loads(json.dumps(log.describe({"seed": 1}, device="cpu", precision="float32")))
    assert told["config"] == {"seed": 1} and told["precision"] == "float32" and told["argv"] == sys.argv
    assert told["versions"]["jax"] == jax.__version__
    assert "secret-key" not in json.dumps(told)


def test_git_names_the_commit_and_a_file_it_lacks(tmp_path: Path):
    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert log.git(tmp_path) is None
    git("init")
    (tmp_path / "a.py").write_text("")
    git("add", "a.py")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert log.git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "experiment.py").write_text("")
    assert log.git(tmp_path) == {"commit": commit, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert log.git(tmp_path / "inside") is None  # an installed package in somebody's repository


def test_progress_never_wraps():
    values = {"loss": 0.123456, "accuracy": 0.98}
    line = ""
    for columns in range(1, 140):
        line = log.progress_line(50, 200, values, 12345.6, 75.0, columns)
        assert len(line) < columns
        assert "50/200"[: columns - 1] in line  # the last to go
        if columns > len("50/200"):  # and the rest goes whole: half a number would be another number
            whole = {"50/200", "loss 0.1235", "accuracy 0.98", "0:01:15 left", "12,346 examples/s"}
            assert {part for part in line.split("  ") if not part.startswith("[")} <= whole
    assert line == "[#####---------------]  50/200  loss 0.1235  accuracy 0.98  0:01:15 left  12,346 examples/s"
    assert log.progress_line(0, 0, {}, 0.0, None, None) == "0/0  ? left  0 examples/s"


def test_plain_lines_without_a_terminal():
    out, now = io.StringIO(), iter([0.0, 0.5, 2.0, 3.0, 3.1])
    show, say = log.console(of=100, stream=out, clock=lambda: next(now))
    for step in (10, 20, 50, 70):
        show(step, {"loss": 1.0}, 1000.0)
    say("eval/loss 1")
    show(100, {"loss": 1.0}, 1000.0)
    assert out.getvalue().splitlines() == [
        "10/100  loss 1  ? left  1,000 examples/s",
        "50/100  loss 1  0:00:02 left  1,000 examples/s",  # 20/100 came within a second
        "70/100  loss 1  0:00:02 left  1,000 examples/s",
        "eval/loss 1",
        "100/100  loss 1  0:00:00 left  1,000 examples/s",  # the last always
    ]


def test_one_line_on_a_terminal():
    ours, theirs = pty.openpty()
    with contextlib.closing(os.fdopen(theirs, "w")) as out:
        show, say = log.console(of=2, stream=out)
        show(1, {"loss": 1.0}, 1.0)
        show(2, {"loss": 0.5}, 1.0)
        say("done")
        time.sleep(0.05)
        seen = os.read(ours, 4096).decode()
    os.close(ours)
    drawn = seen.split("\r")
    assert seen.count("\n") == 1 and seen.endswith("\r\x1b[Kdone\r\n")
    assert "1/2  loss 1" in drawn[1] and "2/2  loss 0.5" in drawn[2]
    assert all(len(line) < 80 + len("\x1b[K") for line in drawn)


def test_a_screen_that_is_gone_ends_no_run():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:  # closing it must not fail either
        show, say = log.console(3, stream)
        say("a line")
        show(3, {"train/loss": 0.5}, 1.0)


def test_quantities_have_three_digits_and_a_prefix():
    given = (0, 7, 999, 1234, 999_999, 9.996e11, 2e16)
    told = [log.quantity(value, "B") for value in given]
    assert told == ["0 B", "7 B", "999 B", "1.23 kB", "1 MB", "1 TB", "20 PB"]


def test_table():
    text = log.table([("a", 1234, 0.5, None), ("long", 5, 1e-7, 2)], ("name", "n", "x", "best"))
    assert text == ("name      n      x  best\n----  -----  -----  ----\na     1,234    0.5\nlong      5  1e-07     2")
    assert log.table([], ("a", "b")) == "a  b\n-  -"


def test_parameter_table_of_abstract_parameters():
    def init() -> dict:
        dense = {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
        return {"Block_0": {"Dense_0": dense}, "scale": jnp.zeros((), jnp.bfloat16)}

    rows = [line.split("  ") for line in log.parameter_table(jax.eval_shape(init)).splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["Block_0/Dense_0", "bias 32, kernel 64x32", "2,080", "8,320"],
        ["/", "scale scalar", "1", "2"],
        ["total", "2,081", "8,322"],
    ]


def test_a_run_takes_away_its_own_rubbish_and_nothing_else(tmp_path: Path):
    own, others = (
        [".status.json.123", ".metrics.jsonl.9"],
        [".zcompdump-5.8.1", ".vimrc.2020", ".env.json.7", ".venv.3"],
    )
    for name in [*own, *others[:-1]]:
        (tmp_path / name).touch()
    (tmp_path / others[-1]).mkdir()
    with log.lock(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_is_told_of_once_and_the_run_goes_on(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def flock(file: IO, how: int) -> None:
        raise OSError(number := getattr(errno, code), os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    log.check_free(tmp_path / "run")
    with log.lock(tmp_path / "run"):
        log.check_free(tmp_path / "run")
        assert (tmp_path / "run/.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "run/.lock") in line and "a second run in this work directory would not be refused" in line

    code = "EIO"  # any other fault is one
    with pytest.raises(OSError, match="Input/output error"), (tmp_path / "file").open("w") as file:
        locks.flock(file, fcntl.LOCK_EX, "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv", "events.out.tfevents.*", "status.json"])
def test_a_file_that_does_not_fit_the_disk_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name.startswith("events"):
        monkeypatch.setattr(log, "_sheet", lambda *_: contextlib.nullcontext(lambda step: None))
    with pytest.raises(OSError, match=re.escape(f"too large: '{tmp_path / name}'")), tiny.full_disk(0):
        if name == "status.json":
            log.status(tmp_path, "running", step=1, of=2)
        with log.writer(tmp_path, 0) as write:
            if name != "metrics.jsonl":
                (tmp_path / "metrics.jsonl").unlink()
                (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
            write(1, {"train/loss": 0.5})

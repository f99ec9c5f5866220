import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated

import pytest

from jaxcompute import log
from jaxcompute.errors import BadInput
from jaxcompute.sweep import grid

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    lr: Annotated[float, "peak learning rate"] = 0.1
    seed: Annotated[int, "of everything"] = 0
    widths: Annotated[tuple[int, ...], "of the layers"] = (8,)
    name: Annotated[str, "free text"] = "a"

    def __post_init__(self):
        if self.seed > 100 * self.lr:
            raise BadInput("seed: too large for lr")


# A run as the sweep sees it: flags in, status.json and metrics.jsonl out, and a stop that is saved.
LAUNCH = """
import os, pathlib, signal, sys, time
from jaxcompute import log

flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir, lr, seed = pathlib.Path(flags["workdir"]), float(flags["config.lr"]), int(flags["config.seed"])
workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / "starts", "a") as starts:
    print(*sys.argv[1:], file=starts)

def stop(number, frame):
    with open(workdir / "signals", "a") as signals:
        print(signal.Signals(number).name, file=signals)
    log.status(workdir, "preempted", step=1, of=2)
    time.sleep(0.3)  # a save; a second signal would be seen
    sys.exit(0)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
log.status(workdir, "running", step=0, of=2)
if (lr, seed) == (0.5, 0):
    sys.exit(1)
with log.writer(workdir, 0) as write:
    write(1, {"eval/accuracy": float("nan") if seed else 0.001})
    write(2, {"eval/accuracy": lr + seed / 100})
if (lr, seed) == (0.3, 0) and "wait" in flags and not (workdir / "signals").exists():
    time.sleep(60)
log.status(workdir, "done", step=2, of=2)
"""


@pytest.fixture
def launch(tmp_path: Path) -> list[str]:
    (tmp_path / "launch.py").write_text(LAUNCH)
    return [sys.executable, str(tmp_path / "launch.py")]


@pytest.fixture(autouse=True)
def find_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_points_are_a_product():
    assert grid.points(Config(), ["lr=.1,1e-2", "widths=8/16,4"]) == [
        {"lr": "0.1", "widths": "8,16"},
        {"lr": "0.1", "widths": "4"},
        {"lr": "0.01", "widths": "8,16"},
        {"lr": "0.01", "widths": "4"},
    ]
    assert len(grid.points(Config(), ["seed=20,30", "lr=0.3,0.4"])) == 4  # though not of the lr that the config has


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["lrr=1"], "no field lrr (did you mean lr?)"),
        (["seed=1,x"], "seed=x: must be an integer"),
        (["seed=1,"], "seed=: must be an integer"),
        (["seed"], "write --sweep=field=value,value"),
        (["seed="], "write --sweep=field=value,value"),
        (["lr=0.1,0.10"], "a value stands twice"),
        (["seed=1", "seed=2"], "seed is swept twice"),
        (["name=a b,a*b"], "share a directory"),
        (["seed=10,11"], "seed: too large for lr"),
    ],
)
def test_a_wrong_sweep(sweeps: list[str], message: str):
    with pytest.raises(BadInput) as error:
        grid.points(Config(), sweeps)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_are_safe_for_files():
    assert grid.name({"lr": "1e-05", "seed": "-1"}) == "lr=1e-05,seed=-1"
    assert grid.name({"widths": "8,16", "name": "../a b"}) == "widths=8-16,name=..-a-b"
    long = [grid.name({"name": "x" * 300 + end}) for end in "ab"]
    assert long[0] != long[1] and max(map(len, long)) <= 200


def test_flags_of_children(tmp_path: Path):
    (tmp_path / "flags").write_text("--sweep=lr=1\n--config.lr=3\n")
    argv = f"launch.py --experiment x --sweep seed=1 --workdir=w --flagfile={tmp_path}/flags -sweep=name=b --nofoo --"
    assert grid.flags_of_children(argv.split()) == ["--experiment", "x", "--config.lr=3", "--nofoo"]


def test_a_failing_point_does_not_stop_the_others(
    tmp_path: Path, launch: list[str], capsys: pytest.CaptureFixture[str]
):
    sweep = tmp_path / "sweep"
    points = grid.points(Config(), ["lr=0.5,0.1,0.9", "seed=0,1"])
    assert grid.run(sweep, [*launch, "--experiment=x"], points, ("accuracy", "max")) == 1
    out, err = capsys.readouterr()
    assert err == "1 of 6 points failed: lr=0.5,seed=0\n"
    rows = list(csv.reader((sweep / "sweep.csv").read_text().splitlines()))
    assert rows == [
        ["lr", "seed", "accuracy", "step", "state"],
        ["0.9", "1", "0.91", "2", "done"],
        ["0.9", "0", "0.9", "2", "done"],
        ["0.5", "1", "0.51", "2", "done"],
        ["0.1", "1", "0.11", "2", "done"],
        ["0.1", "0", "0.1", "2", "done"],
        ["0.5", "0", "", "", "running"],
    ]
    assert out.splitlines()[-8:-6] == ["lr   seed  accuracy  step  state", "---  ----  --------  ----  -------"]
    assert [line.split() for line in out.splitlines()[-6:]] == [[c for c in row if c] for row in rows[1:]]
    assert (sweep / "sweep.md").read_text().splitlines()[:3] == [
        "| lr | seed | accuracy | step | state |",
        "| --- | --- | --- | --- | --- |",
        "| 0.9 | 1 | 0.91 | 2 | done |",
    ]
    assert (sweep / "lr=0.9,seed=1" / "starts").read_text() == (
        f"--experiment=x --workdir={sweep}/lr=0.9,seed=1 --config.lr=0.9 --config.seed=1\n"
    )

    # again: only the failed one is tried; and the least loss first where less is better
    assert grid.run(sweep, launch, points, ("accuracy", "min")) == 1
    starts = {file.parent.name: len(file.read_text().splitlines()) for file in sweep.glob("*/starts")}
    assert starts == {grid.name(point): 1 + (point == {"lr": "0.5", "seed": "0"}) for point in points}
    first = (sweep / "sweep.csv").read_text().splitlines()[1:4]
    assert first == ["0.1,0,0.001,1,done", "0.9,0,0.001,1,done", "0.1,1,0.11,2,done"]


def test_all_done_is_exit_0(tmp_path: Path, launch: list[str]):
    assert grid.run(tmp_path / "s", launch, grid.points(Config(), ["lr=0.2", "seed=3"]), ("accuracy", "max")) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_reaches_the_child_once_and_the_same_command_goes_on(
    tmp_path: Path, launch: list[str], number: signal.Signals, request: pytest.FixtureRequest
):
    sweep = tmp_path / "a sweep"
    program = textwrap.dedent(f"""
        import sys, pathlib
        from jaxcompute.sweep import grid
        points = [{{"lr": lr, "seed": "0"}} for lr in ("0.1", "0.3", "0.4")]
        sys.exit(grid.run(pathlib.Path({str(sweep)!r}), {[*launch, "--wait=1"]!r}, points, ("accuracy", "max")))
    """)

    def start() -> subprocess.Popen:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
        pipe = subprocess.PIPE
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True, process_group=0)
        request.addfinalizer(parent.kill)
        return parent

    def states() -> dict[str, str]:
        return {child.name: log.read_status(child).get("state", "") for child in sweep.glob("lr=*")}

    parent = start()
    deadline = time.monotonic() + 30
    while not (sweep / "lr=0.3,seed=0" / "metrics.jsonl").exists() or not log.read(sweep / "lr=0.3,seed=0").get(2):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, parent.pid, os.WSTOPPED)  # a signal of a lower number would overtake it
    os.killpg(parent.pid, number)  # the whole group, as a terminal does
    time.sleep(0.2)
    assert not (sweep / "lr=0.3,seed=0" / "signals").exists()  # it comes from the parent alone
    os.kill(parent.pid, signal.SIGCONT)
    out, err = parent.communicate(timeout=30)
    assert [line for line in out.splitlines() if line.startswith("[")] == ["[1/3] lr=0.1,seed=0", "[2/3] lr=0.3,seed=0"]
    assert parent.returncode == 128 + number
    assert err == f"stopped by {number.name}; the same command with '--workdir={sweep}' goes on\n"
    assert states() == {"lr=0.1,seed=0": "done", "lr=0.3,seed=0": "preempted"}
    assert (sweep / "lr=0.3,seed=0" / "signals").read_text() == f"{number.name}\n"

    parent = start()
    parent.communicate(timeout=30)
    assert parent.returncode == 0
    assert states() == {f"lr={lr},seed=0": "done" for lr in ("0.1", "0.3", "0.4")}
    assert len((sweep / "lr=0.1,seed=0" / "starts").read_text().splitlines()) == 1
    assert json.loads((sweep / "lr=0.3,seed=0" / "status.json").read_text())["state"] == "done"


def test_the_folder_of_a_point_is_not_taken_for_its_sweeps(tmp_path):
    points = grid.points(Config(), ["seed=0,1"])
    own = tmp_path / grid.name(points[0])
    grid.check(own, Config(), points)  # a name alone says nothing
    own.mkdir()
    log.write_json(own / "config.json", {"config": {}})
    with pytest.raises(BadInput, match=rf"of one point of the sweep: give the sweep's own, {tmp_path}$"):
        grid.check(own, Config(), points)

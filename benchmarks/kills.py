"""Kill a real training process 200 times, and look at what it leaves and what becomes of it.

    python benchmarks/kills.py            some minutes; leaves benchmarks/results/kills-<date>.json
    python benchmarks/kills.py --kills=10 --out=/tmp/kills.json

`launch.py` trains digits_mlp, saving every 10 steps, the last 3 and the best kept. Each life gets SIGKILL at a random
moment, aimed by turns at its start, its restore, its compilation (half of them with an empty compile cache), a step, a
save and a deletion; where it landed is read off the disk and the screen afterwards. A run of the same config that
nobody disturbs is the truth. After each kill:

- every step that is listed restores, and its digest is the truth's at that step;
- at most the save that was in flight is lost: nothing that was listed before, and one save point at most;
- the next life resumes at the newest step listed, and clears all rubbish that earlier lives left.

At the end metrics.jsonl, metrics.csv and the TensorBoard events hold each step once, with the truth's values.
"""

import argparse
import csv
import datetime
import math
import multiprocessing
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from jaxcompute import checkpoint, log, sharding, train, verify  # noqa: E402
from jaxcompute import config as configs  # noqa: E402

AIMS = ("anywhere", "restore", "compile", "compile anew", "step", "save", "save", "delete")
FIELDS = {"save_every": "10", "eval_every": "100", "log_every": "20", "features": "64,64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no kill after these")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/kills-{today}.json")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxcompute-kills-"))
    print(f"in {folder}", flush=True)
    results = benchmark(folder, given.kills, given.minutes, random.Random(given.seed))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log.write_json(given.out, results)
    landed = [(where, count) for where, count in results["landed"].items()]
    print(log.table(landed, ("the kill landed in", "kills")))
    print(log.table([(name, results[name]) for name in WRONG], ("what should not be", "found")))
    print("\n".join(results["problems"][:20]))
    if not results["problems"]:
        shutil.rmtree(folder)
    sys.exit(1 if results["problems"] else 0)


WRONG = (
    "steps_that_do_not_restore_equal",
    "saves_lost_beyond_the_one_in_flight",
    "rubbish_left",
    "metrics_that_differ",
)


def benchmark(folder: Path, kills: int, minutes: float, rng: random.Random) -> dict[str, Any]:
    fields = FIELDS | {"steps": str(40 * kills)}
    unbroken, killed = folder / "unbroken", folder / "killed"
    began = time.monotonic()

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    FORKS.set_forkserver_preload(IMPORTS)
    process = start(unbroken, fields | {"keep_last": str(2**31)})
    while process.poll() is None and "compiled in" not in verify.screen(unbroken).read_text():
        time.sleep(0.1)
    paces = Pace(time.monotonic() - began)
    verify.finish(process, unbroken)
    truth = {step: digest for step, digest, _, _ in verify.side_by_side(unbroken / "checkpoints", folder / "none")}
    print(f"the unbroken run: {len(truth)} saves in {time.monotonic() - began:.0f} s", flush=True)

    like, directory = shapes(fields), killed / "checkpoints"
    found = {name: 0 for name in WRONG}
    problems: list[str] = []
    landed, resumed, restored, newest, in_flight = Counter[str](), 0, 0, 0, 0

    def wrong(what: str, words: str) -> None:
        found[what] += 1
        problems.append(words)

    for kill in range(1, kills + 1):
        if time.monotonic() - began > 60 * minutes:
            break
        before = rubbish(killed)
        where, at = live_and_die(killed, fields, AIMS[kill % len(AIMS)], rng, paces)
        if where is None:
            problems.append(f"life {kill} ended by itself: {verify.screen(killed).read_text().splitlines()[-1:]}")
            break
        landed[where] += 1
        resumed += at is not None
        if (at or 0) != newest and (at is not None or where not in ("start", "restore")):
            wrong(WRONG[1], f"life {kill} went on at step {at or 0}; the newest listed was {newest}")
        listed = checkpoint.steps(directory)
        for step in listed:
            try:
                state = checkpoint.restore(directory, step, like)
            except Exception as error:
                wrong(WRONG[0], f"kill {kill}: step {step}: {error}")
                continue
            restored += 1
            if checkpoint.digest(state) != truth[step]:
                wrong(WRONG[0], f"kill {kill}: step {step} is another State than the unbroken run's")
        now = max(listed, default=0)
        begun = log.read_status(killed).get("step", 0)  # written when a save has begun
        lost = [step for step in truth if now < step <= begun]
        in_flight += len(lost) == 1
        if now < newest or len(lost) > 1:
            wrong(WRONG[1], f"kill {kill}: newest {newest} before, {now} now, saves begun up to {begun}")
        if now > newest or where in ("save", "delete"):  # it had come to saving, so it had cleared up
            for name in before & rubbish(killed):
                wrong(WRONG[2], f"kill {kill}: {name} of an earlier life is still there")
        newest = now
        if kill % 20 == 0:
            print(f"{kill} kills, {time.monotonic() - began:.0f} s, step {newest}: {dict(landed)}", flush=True)

    verify.finish(start(killed, fields), killed)
    for line in verify.begun_anew(killed, newest):
        wrong(WRONG[1], line)
    for name in rubbish(killed):
        wrong(WRONG[2], f"at the end: {name}")
    for step in checkpoint.steps(directory):
        if checkpoint.digest(checkpoint.restore(directory, step, like)) != truth[step]:
            wrong(WRONG[0], f"at the end: step {step} is another State than the unbroken run's")
    unlike = [*verify.differences(unbroken, killed), *sheet_differs(unbroken, killed), *events_differ(unbroken, killed)]
    for line in unlike:
        wrong(WRONG[3], line)

    config = log.read_json(unbroken / "config.json") or {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        "device": config["device"],
        "processor": processor(),
        "versions": config["versions"],
        "git": config["git"],
        "fields": fields | {"keep_last": "3", "keep_best": "1"},
        "kills": sum(landed.values()),
        "landed": dict(landed.most_common()),
        "lives_that_resumed": resumed,
        "steps_restored_and_equal": restored - found[WRONG[0]],
        "kills_that_lost_the_save_in_flight": in_flight,
        "metrics_compared_in_each_of_three_files": len(verify.metrics(unbroken)),
        **found,
        "problems": problems,
        "seconds": round(time.monotonic() - began),
    }


class Pace:
    """Seconds that the parts of a life took lately, to aim by."""

    def __init__(self, whole: float) -> None:
        self.whole, self.restore, self.compile, self.save = whole, 1.0, 1.0, 0.05


def arguments(workdir: Path, fields: dict[str, str], experiment: str) -> list[str]:
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return [str(ROOT / "launch.py"), f"--experiment={experiment}", f"--workdir={workdir}", *flags]


def start(workdir: Path, fields: dict[str, str], experiment: str = "digits_mlp") -> subprocess.Popen:
    """As a user does."""
    with verify.screen(workdir).open("w") as file:
        return subprocess.Popen([sys.executable, *arguments(workdir, fields, experiment)], stdout=file, stderr=file)


def fork(workdir: Path, fields: dict[str, str], cache: Path, experiment: str = "digits_mlp") -> BaseProcess:
    """The same in a process that has the imports behind it."""
    process = FORKS.Process(target=live, args=(arguments(workdir, fields, experiment), verify.screen(workdir), cache))
    process.start()
    return process


FORKS = multiprocessing.get_context("forkserver")
IMPORTS = ["launch", "jaxcompute.train", "jaxcompute.optim", "jaxcompute.models.mlp", "jaxcompute.data.memory"]
IMPORTS += ["sklearn.datasets", "orbax.checkpoint", "tensorboardX.event_file_writer"]


def live(argv: list[str], screen: Path, cache: Path) -> None:
    with screen.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.argv = argv
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)  # launch tells jax
    import launch

    launch.launch()


def live_and_die(
    workdir: Path, fields: dict[str, str], aim: str, rng: random.Random, pace: Pace
) -> tuple[str | None, int | None]:
    """One life. Where the kill landed (None: it ended by itself), and the step it had resumed at, if it got there."""
    cold = workdir.parent / "cold"
    if aim == "compile anew" and rng.random() < 0.5:
        shutil.rmtree(cold, ignore_errors=True)  # otherwise it has what a killed compilation left
    old = rubbish(workdir)
    began = time.monotonic()
    if aim == "anywhere":
        process = start(workdir, fields)
        alive, wait = (lambda: process.poll() is None), process.wait
    else:
        process = fork(workdir, fields, cold if aim == "compile anew" else workdir.parent / "cache")
        alive, wait = process.is_alive, process.join

    def held() -> bool:
        lock = workdir / ".lock"
        return lock.exists() and lock.read_text().startswith(f"process {process.pid} ")

    def says(word: str) -> bool:
        return word in verify.screen(workdir).read_text()

    def passed(condition: Any, rest: float = 0.001) -> float:
        while alive() and not condition():
            time.sleep(rest)
        return time.monotonic() - began

    if aim == "anywhere":
        time.sleep(rng.uniform(0, pace.whole))
    else:
        locked = passed(held)
        if aim == "restore":
            time.sleep(rng.uniform(0, pace.restore))
        else:
            restored = passed(lambda: says("Dense_0"))  # the table of parameters, right after
            pace.restore = restored - locked
            if aim.startswith("compile"):
                time.sleep(rng.uniform(0, pace.compile))
            else:
                compiled = passed(lambda: says("compiled in"))
                pace.compile = compiled - restored
                passed(lambda: not old & rubbish(workdir))
                first = max(checkpoint.steps(workdir / "checkpoints"), default=0)
                goal = first + 10 * rng.randint(1, 2)
                passed(lambda: max(checkpoint.steps(workdir / "checkpoints"), default=0) >= goal)
                if aim == "step":
                    time.sleep(rng.uniform(0, 0.1))
                else:
                    pattern = f".tmp-*-{process.pid}" if aim == "save" else ".trash-*"
                    passed(lambda: any((workdir / "checkpoints").glob(pattern)), rest=0)
                    time.sleep(rng.uniform(0, pace.save) if aim == "save" else 0)
    ended = not alive()
    process.kill()
    wait()
    if ended:
        return None, None
    said = verify.screen(workdir).read_text()
    resumed = re.search(r"resuming at step ([\d,]+)", said)
    at = int(resumed[1].replace(",", "")) if resumed else None
    fresh = rubbish(workdir) - old
    if "compiled in" in said:
        if any(name.startswith(".trash") for name in fresh):
            return "delete", at
        return ("save" if any(name.startswith(".tmp") for name in fresh) else "step"), at
    if "Dense_0" in said:
        return "compile", at
    return ("restore" if held() else "start"), at


def rubbish(workdir: Path) -> set[str]:
    """Names of what no whole life leaves."""
    return {path.name for path in [*(workdir / "checkpoints").glob(".*"), *workdir.glob(".*.[0-9]*")]}


def shapes(fields: dict[str, str]) -> Any:
    """The State's shapes, to restore by."""
    module = configs.load("digits_mlp", ROOT / "experiments")
    exp = module.experiment(configs.replace(module.Config(), fields))
    mesh = sharding.make_mesh(exp.config)
    return train.compile(train.resolve(exp, mesh), mesh).abstract


def sheet_differs(unbroken: Path, killed: Path) -> list[str]:
    tables = []
    for workdir in (unbroken, killed):
        with (workdir / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append(
            Counter(
                (row["step"], tag, value)
                for row in rows
                for tag, value in row.items()
                if value and tag != "step" and not tag.startswith(verify.TIMED)
            )
        )
    return [f"metrics.csv: {cell}" for cell in (tables[0] - tables[1]) + (tables[1] - tables[0])]


def events_differ(unbroken: Path, killed: Path) -> list[str]:
    """TensorBoard holds 32 bits of each value of metrics.jsonl."""
    truth = Counter(
        (step, tag, str(np.float32(math.nan if value is None else value)))
        for step, tag, value in verify.logged(unbroken)
        if not tag.startswith(verify.TIMED)
    )
    (file,) = killed.glob("events.out.tfevents.*")
    data, events = file.read_bytes(), Counter[tuple[int, str, str]]()
    while data:  # a TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            if not value.tag.startswith(verify.TIMED):
                events[event.step, value.tag, str(np.float32(value.simple_value))] += 1
        data = data[16 + length :]
    return [f"events: {value}" for value in (truth - events) + (events - truth)]


def processor() -> str:
    return f"{machine.processor()}, {os.cpu_count()} threads"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the trained process may have the accelerator to itself
    main()

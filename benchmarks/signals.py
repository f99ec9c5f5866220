"""Send SIGTERM or SIGINT to a real training process 100 times, and look at what it leaves and how soon it goes.

    python benchmarks/signals.py             some minutes; leaves benchmarks/results/signals-<date>.json
    python benchmarks/signals.py --signals=10 --out=/tmp/signals.json

`launch.py` trains digits_mlp, whose steps are short and whose saves are many, and in every tenth life cifar_resnet, of
which one step takes a good part of a second and an evaluation many. By turns the signal is aimed at the imports, the
start of `fit`, the compilation, the training and a save; in cifar_resnet's evaluation and training it comes anywhere.
Half of the lives get a second signal soon after the first. Then:

- before `fit` sees to signals the process ends by the signal, and nothing was begun;
- afterwards it exits with 128 + n, status.json says `preempted`, and what was trained is on the disk;
- the same command goes on from there, and at the end every State and metric is an undisturbed run's (digits_mlp).
"""

import argparse
import datetime
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
from kills import ROOT

from jaxcompute import checkpoint, log, verify  # kills has put the repository's root on the path

FIELDS = {
    "digits_mlp": {"save_every": "100", "eval_every": "300", "log_every": "100"},
    "cifar_resnet": {"save_every": "10", "eval_every": "5", "log_every": "2", "steps": "100000"},
}
AIMS = ("imports", "start", "compile", "training", "save", "imports", "compile", "training", "save", "cifar_resnet")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no signal after these")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/signals-{today}.json")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxcompute-signals-"))
    print(f"in {folder}", flush=True)
    results = benchmark(folder, given.signals, given.minutes, random.Random(given.seed))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log.write_json(given.out, results)
    print(log.table(list(results["landed"].items()), ("the signal landed in", "signals")))
    seconds = [(name, found["median"], found["max"]) for name, found in results["seconds_to_exit"].items()]
    print(log.table(seconds, ("seconds to exit", "median", "max")))
    print("\n".join(results["problems"][:20]) or "nothing that should not be")
    if not results["problems"]:
        shutil.rmtree(folder)
    sys.exit(1 if results["problems"] else 0)


def benchmark(folder: Path, count: int, minutes: float, rng: random.Random) -> dict[str, Any]:
    began, problems, landed, twice, saved = time.monotonic(), [], Counter[str](), 0, 0
    seconds: dict[str, list[float]] = {}
    fields = FIELDS | {"digits_mlp": FIELDS["digits_mlp"] | {"steps": str(400 * count)}}  # to outlive all signals
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    kills.FORKS.set_forkserver_preload(kills.IMPORTS)

    whole, pace = folder / "whole", {"imports": 5.0, "compile": 2.0}
    process = kills.start(whole, fields["digits_mlp"] | {"keep_last": str(2**31)})
    verify.finish(process, whole)
    print(f"the undisturbed run: {time.monotonic() - began:.0f} s", flush=True)

    for life in range(count):
        if time.monotonic() - began > 60 * minutes:
            break
        aim = AIMS[life % len(AIMS)]
        name = aim if aim in FIELDS else "digits_mlp"
        workdir, signum, second = folder / name, rng.choice(SIGNALS), rng.random() < 0.5
        newest, before = max(checkpoint.steps(workdir / "checkpoints"), default=0), log.read_status(workdir)
        run = Life(workdir, fields[name], name, forked=aim not in ("imports", "cifar_resnet"), cache=folder / "cache")
        run.wait_for(aim, pace, rng)
        where, sent = run.place(), time.monotonic()
        run.signal(signum)
        given = [signum]  # of two that are pending at once the lower number is seen first
        if second:
            time.sleep(rng.uniform(0, 0.3))
            given.append(rng.choice(SIGNALS))
            twice += run.signal(given[1])
        code = run.code()
        if code == 0:
            problems.append(f"life {life} came to its end before its signal")
            break
        took, words, status = time.monotonic() - sent, run.said(), log.read_status(workdir)
        at = max(checkpoint.steps(workdir / "checkpoints"), default=0)
        wrong = []
        if where == "imports" and code < 0:
            if at != newest or status != before:
                wrong.append("ended by the signal, and yet something was begun")
        else:
            where = "start" if where == "imports" else where
            seconds.setdefault(name, []).append(round(took, 2))
            if "Traceback" in words or code not in [128 + number for number in given]:
                wrong.append(f"exit code {code} after signal {signum}: {words.splitlines()[-1:]}")
            if (status.get("state"), status.get("pid")) != ("preempted", run.pid):
                wrong.append(f"status.json says {status.get('state')} of process {status.get('pid')}")
            stopped = re.search(r"stopped by \w+ at step ([\d,]+)", words)
            if stopped is None or int(stopped[1].replace(",", "")) != at:
                wrong.append(f"it says {stopped and stopped[0]!r}; the newest on the disk is of step {at}")
            elif at and where in ("training", "save"):
                saved += 1
                where = "evaluation" if checkpoint.manifest(workdir / "checkpoints", at)["extra"]["owed"] else where
        resumed = re.search(r"resuming at step ([\d,]+)", words)
        if at < newest or (resumed and int(resumed[1].replace(",", "")) != newest):
            wrong.append(f"newest before {newest}, now {at}; it says {resumed and resumed[0]!r}")
        landed[where] += 1
        problems += [f"life {life}, {name}, {where}: {line}" for line in wrong]
        if life % 10 == 9:
            print(f"{life + 1} signals, {time.monotonic() - began:.0f} s: {dict(landed)}, {seconds}", flush=True)

    told = folder / "digits_mlp"
    verify.finish(kills.start(told, fields["digits_mlp"]), told)
    digests = [log.read_status(workdir)["digest"] for workdir in (whole, told)]
    if len(set(digests)) > 1:
        problems.append(f"the States at the end differ: {digests}")
    problems += [*verify.differences(whole, told), *kills.sheet_differs(whole, told)]

    config = log.read_json(whole / "config.json") or {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/signals.py", *sys.argv[1:]]),
        "device": config["device"],
        "processor": kills.processor(),
        "load": os.getloadavg(),  # what else the machine had to do
        "versions": config["versions"],
        "git": config["git"],
        "fields": fields,
        "signals": sum(landed.values()),
        "followed_by_a_second": twice,
        "landed": dict(landed.most_common()),
        "had_begun_training_and_saved": saved,
        "seconds_to_exit": {
            name: {"median": statistics.median(found), "max": max(found)} for name, found in seconds.items()
        },
        "metrics_compared": len(verify.metrics(whole)),
        "problems": problems,
        "seconds": round(time.monotonic() - began),
    }


class Life:
    """A run in a process of its own, seen from outside."""

    def __init__(self, workdir: Path, fields: dict[str, str], experiment: str, forked: bool, cache: Path):
        self.workdir = workdir
        if forked:  # the imports are behind it
            process = kills.fork(workdir, fields, cache, experiment)
            self.alive: Callable[[], bool] = process.is_alive
            self.wait, self.ended_with = process.join, lambda: process.exitcode
        else:
            process = kills.start(workdir, fields, experiment)
            self.alive, self.wait = lambda: process.poll() is None, process.wait
            self.ended_with = lambda: process.returncode
        self.pid = process.pid or 0

    def signal(self, signum: int) -> bool:
        """Whether it was alive to get it."""
        alive = self.alive()
        if alive:
            os.kill(self.pid, signum)
        return alive

    def code(self) -> int:
        self.wait()
        return self.ended_with() or 0

    def said(self) -> str:
        return verify.screen(self.workdir).read_text() if verify.screen(self.workdir).exists() else ""

    def held(self) -> bool:
        """Whether `fit` has begun."""
        lock = self.workdir / ".lock"
        try:
            return lock.read_text().startswith(f"process {self.pid} ")
        except OSError:
            return False

    def passed(self, condition: Callable[[], bool]) -> float:
        """Seconds until it holds."""
        began = time.monotonic()
        while self.alive() and not condition():
            time.sleep(0.002)
        return time.monotonic() - began

    def saving(self) -> bool:
        return any(self.workdir.glob(f"checkpoints/.tmp-*-{self.pid}"))

    def wait_for(self, aim: str, pace: dict[str, float], rng: random.Random) -> None:
        """Until the moment of the signal."""
        if aim == "imports":
            time.sleep(rng.uniform(0, pace["imports"]))
            return
        self.passed(self.held)
        if aim == "start":
            return
        self.passed(lambda: "Dense" in self.said())  # the table of parameters, right before it compiles
        if aim == "compile":
            time.sleep(rng.uniform(0, pace["compile"]))
            return
        pace["compile"] = self.passed(lambda: "compiled in" in self.said())
        if aim == "save":
            self.passed(self.saving)
        else:
            time.sleep(rng.uniform(0, 0.3 if aim == "training" else 25))

    def place(self) -> str:
        """Where it is now."""
        if not self.held():
            return "imports"
        words = self.said()
        if "compiled in" in words:
            return "save" if self.saving() else "training"
        return "compile" if "Dense" in words else "start"


if __name__ == "__main__":
    main()

"""Start a second run on a work directory that is in use, 50 times: what does it say, and what becomes of the first?

    python benchmarks/second_run.py        four minutes; leaves benchmarks/results/second-run-<date>.json

`launch.py` trains digits_mlp. Beside it the same command is given again and again: it must be refused in one line that
names host and process, with exit code 2. The first run, disturbed so, must end with the State and metrics of one that
was alone. Then its holder gets SIGKILL in the midst of a run, and the next command must take the directory over.
"""

import argparse
import datetime
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills
from kills import ROOT

from jaxcompute import checkpoint, log, verify  # kills has put the repository's root on the path

FIELDS = {"save_every": "2000", "eval_every": "20000", "log_every": "1000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100_000, help="of the first run: enough to outlast the others")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/second-run-{today}.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxcompute-second-") as folder:
        found = benchmark(Path(folder), given.runs, FIELDS | {"steps": str(given.steps)})
    shown = [(name, value) for name, value in found.items() if name not in ("versions", "git")]
    print(log.table(shown, ("what", "value")))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log.write_json(given.out, found)
    sys.exit(1 if found["problems"] else 0)


def benchmark(folder: Path, runs: int, fields: dict[str, str]) -> dict[str, Any]:
    alone, first, problems, seconds = folder / "alone", folder / "first", [], []
    verify.finish(kills.start(alone, fields), alone)
    holder = begun(first, fields)
    who = f"process {holder.pid} on {socket.gethostname()}"
    for run in range(runs):
        began = time.perf_counter()
        command = [sys.executable, *kills.arguments(first, fields, "digits_mlp")]
        second = subprocess.run(command, capture_output=True, text=True)
        seconds.append(round(time.perf_counter() - began, 2))
        if holder.poll() is not None:
            problems.append(f"the first run ended before second run {run}: more --steps")
            break
        if second.returncode != 2 or len(second.stderr.splitlines()) != 1 or f"is in use by {who}" not in second.stderr:
            problems.append(f"second run {run}: exit code {second.returncode}: {second.stderr.splitlines()[-1:]}")
    verify.finish(holder, first)
    if log.read_status(first)["digest"] != log.read_status(alone)["digest"]:
        problems.append("the first run ended with another State than one that was alone")
    problems += verify.differences(alone, first)

    dead = folder / "dead"
    process = begun(dead, fields)
    while not checkpoint.steps(dead / "checkpoints"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    verify.finish(kills.start(dead, fields), dead)
    if log.read_status(dead)["digest"] != log.read_status(alone)["digest"]:
        problems.append("the run that followed a dead one ended with another State")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/second_run.py", *sys.argv[1:]]),
        "processor": kills.processor(),
        "load": os.getloadavg(),
        "versions": log.versions(),
        "git": log.git(),
        "fields": fields,
        "runs_refused": len(seconds) - sum(problem.startswith("second run") for problem in problems),
        "seconds_from_command_to_exit": {"median": statistics.median(seconds), "max": max(seconds)},
        "problems": problems,
    }


def begun(workdir: Path, fields: dict[str, str]) -> subprocess.Popen:
    process = kills.start(workdir, fields)
    while "compiled in" not in verify.screen(workdir).read_text():
        time.sleep(0.05)
    return process


if __name__ == "__main__":
    main()

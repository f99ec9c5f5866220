"""How long from the command to the first step, and where does the time go?

    python benchmarks/first_step.py

`launch.py`, pinned to one core, with a compile cache of its own: the first start of each experiment compiles, the
others find what it left. Most of its modules are imported first, so that their time can be told apart, and then its own
`launch()` is called, whose lines mark the other parts: the table of parameters comes when the data is there and the
step has been traced for its shapes; the line of the device once the step is compiled, or read from the cache; the line
of step 1 with what that made. `--help` stands beside. Medians of wall time, the experiments by turns.
"""

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import processor  # noqa: E402
from jaxcompute import log  # noqa: E402

MARKS = {  # how the line after a part begins
    "imports": "imported",
    "data and trace": "layer ",
    "compile": r"\d+ x ",
    "first step": "1/",
}
START = (
    "import launch, experiments.{0}, jaxcompute.distributed, jaxcompute.sharding, jaxcompute.train; "
    "print('imported'); launch.launch()"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiments", default="digits_mlp,cifar_resnet")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, default=ROOT / f"benchmarks/results/first-step-{datetime.date.today()}.json"
    )
    given = parser.parse_args()
    names = given.experiments.split(",")
    if given.turns < 1:
        parser.error(f"--turns={given.turns}: give 1 or more")
    if unknown := [name for name in names if not (ROOT / f"experiments/{name}.py").exists()]:
        parser.error(f"--experiments={','.join(unknown)}: not in experiments/")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # all that it starts is pinned with it
    with tempfile.TemporaryDirectory(prefix="jaxcompute-first-step-") as folder:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        cold = {name: start(name, env) for name in names}
        cached = Path(f"{folder}/cache")
        compiled = sorted(cached.glob("*"))
        if not compiled:
            raise RuntimeError("the first starts left nothing in the compile cache")
        warm: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        helps: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(given.turns):
            for name in names:
                warm[name].append(start(name, env))
                if sorted(cached.glob("*")) != compiled:
                    raise RuntimeError(f"{name} compiled something again: its times are not the cache's")
                helps[name].append(help_of(name, env))
                total = sum(warm[name][-1].values())
                print(f"{turn + 1}/{given.turns} {name}: {total:.2f} s", file=sys.stderr, flush=True)
    found = {
        name: {part: statistics.median(run[part] for run in warm[name]) for part in warm[name][0]} for name in names
    }
    totals = {name: sorted(sum(run.values()) for run in warm[name]) for name in names}
    rows: list[Any] = [
        (
            name,
            f"{statistics.median(totals[name]):.2f}",
            f"{totals[name][0]:.2f} to {totals[name][-1]:.2f}",
            *(f"{seconds:.2f}" for seconds in parts.values()),
            f"{sum(cold[name].values()):.2f}",
            f"{statistics.median(helps[name]):.2f}",
        )
        for name, parts in found.items()
    ]
    print(
        log.table(rows, ("experiment", "seconds", "range", *next(iter(found.values())), "without the cache", "--help"))
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"device": f"one core of {processor()}", "turns": given.turns, "seconds": totals}
    log.write_json(given.out, log.describe({}, **told, parts=found, without_the_cache=cold, help=helps))


def help_of(name: str, env: dict[str, str]) -> float:
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "launch.py"), f"--experiment={name}", "--help"]
    subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def start(name: str, env: dict[str, str]) -> dict[str, float]:
    """Seconds of each part, from the command to the first step.

    Raises:
        RuntimeError: it ended before, or failed.
    """
    parts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as workdir:
        flags = [f"--experiment={name}", "--config.steps=1", "--config.log_every=1", f"--workdir={workdir}/run"]
        command = [sys.executable, "-u", "-c", START.format(name), *flags]
        last = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            said, wanted = [], iter(MARKS.items())
            part, mark = next(wanted)
            for line in process.stdout or ():
                said.append(line)
                if re.match(mark, line):
                    now = time.perf_counter()
                    parts[part], last = now - last, now
                    part, mark = next(wanted, ("", "(?!)"))
    if process.returncode or len(parts) < len(MARKS):
        raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode}: {''.join(said[-5:])}")
    return parts


if __name__ == "__main__":
    main()

"""The GPU suite: all that is to be measured on one NVIDIA GPU, in stages, by one command.

    python benchmarks/gpu.py --out=DIR                                  every stage, those of most worth first
    python benchmarks/gpu.py --out=DIR --limit_s=500 --pieces=PIECES    within so many seconds, CIFAR-10 unpacked first
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --out=DIR --tiny         proof that all of it runs, on any machine

A stage (gpu_stages.py) has a process of its own and leaves DIR/<stage>.json and DIR/<stage>.log. The same command goes
on: what is done is not done again, what failed is. A stage that would not fit into the time that is left is not begun;
one that is ended keeps the figures that it had. DIR/summary.txt and summary.json have those of all stages; they and a
packed trace are also copied to --back. Nothing is fetched: the machine needs jax, flax, optax and orbax, and for the
peers PyTorch. CIFAR-10 comes from the data folder or from the two pieces of pack_cifar.py; without it made-up images
serve, but for the speedruns and the whole trainings, which are left out.

Its figures on a GPU are open: it has been run on the CPU alone, where speed means nothing.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_stages as stages
from benchmarks import machine, pack_cifar
from jaxcompute import log
from jaxcompute.compute import nvml
from jaxcompute.data import sources
from jaxcompute.errors import BadInput


class Stage(NamedTuple):
    run: Callable[..., dict[str, Any]]
    seconds: float  # that it takes on an H100, estimated; it is ended after three times as many
    images: Literal["none", "any", "real"] = "none"  # of CIFAR-10


STAGES = {
    "correct": Stage(stages.correct, 90),
    "peers_resnet18": Stage(partial(stages.peers, work="resnet18_b256"), 90),
    "peers_resnet50": Stage(partial(stages.peers, work="resnet50"), 150),
    "speedrun": Stage(stages.speedrun, 100, "real"),
    "speedrun_torch": Stage(stages.speedrun_torch, 90, "real"),
    "restore": Stage(stages.restore, 40),
    "resume": Stage(stages.resume, 45),
    "deterministic": Stage(stages.deterministic, 80),
    "roofs": Stage(stages.roofs, 130),
    "trainings": Stage(stages.trainings, 240, "real"),
    "sweep": Stage(stages.sweep, 200, "any"),
    "loops": Stage(stages.loops, 90, "any"),
    "profile": Stage(stages.profiled, 45, "any"),
    "doctor": Stage(stages.doctor, 25),
    "inference": Stage(partial(stages.peers, work="resnet18_b256", jobs="1,32,256"), 80),
    "benchmark": Stage(stages.benchmarked, 240, "any"),
}

MADE_UP = "made_up"  # folder of images that stand for CIFAR-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is left")
    parser.add_argument("--stages", default=",".join(STAGES), help="by default all: %(default)s")
    parser.add_argument("--limit_s", type=float, default=float("inf"), help="seconds for all of it")
    parser.add_argument("--pieces", type=Path, help="folder of the pieces of CIFAR-10, or of one of them, or of none")
    parser.add_argument("--back", type=Path, help="also copy the summary and the trace there")
    parser.add_argument("--tiny", action="store_true", help="small nets, few steps: only that it runs")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out = given.out.absolute()
    if given.stage:
        sys.exit(one(given.stage, given))
    names = given.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages={','.join(unknown)}: there are {', '.join(STAGES)}")
    suite(names, given)


def suite(names: list[str], given: argparse.Namespace) -> None:
    """The stages one after the other, those that are done left alone."""
    end = time.monotonic() + given.limit_s
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(given.out / "cache")
    )  # what one stage compiles serves others
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    real = bring_images(given, {STAGES[name].images for name in names})
    for name in names:
        stage, left = STAGES[name], end - time.monotonic()
        if (told := read(given.out, name)) and (told["state"], told["tiny"]) == ("done", given.tiny):
            print(f"{name}: done before", flush=True)
        elif stage.seconds > left:
            need = f"it takes some {stage.seconds:.0f} s and {max(0, left):.0f} s are left"
            print(f"{name}: not begun, as {need}", flush=True)
        elif stage.images == "real" and not (real or given.tiny):
            leave(given, name, "left out", 0, why="CIFAR-10 is not here: bring both pieces, --pieces=DIR")
        else:
            print(f"{name}: some {stage.seconds:.0f} s on an H100", flush=True)
            begin(name, given, min(left, 3 * stage.seconds))
        summarise(given)
    print((given.out / "summary.txt").read_text(), end="")


def bring_images(given: argparse.Namespace, wanted: set[str]) -> bool:
    """Have a CIFAR-10 in the data folder that the stages see; whether it is the real one."""
    if wanted <= {"none"}:
        return False
    own = given.out / "data"
    if given.pieces and not (own / "jaxcompute/cifar10.npz").exists():
        try:
            print(f"unpacked {pack_cifar.place(given.pieces, own)}", flush=True)
        except BadInput as error:
            print(error, flush=True)
    for folder in (own, sources.data_dir()):
        if (folder / "jaxcompute/cifar10.npz").exists():
            os.environ["JAXCOMPUTE_DATA_DIR"] = str(folder)
            return True
    made_up = given.out / MADE_UP
    if not (made_up / "jaxcompute/cifar10.npz").exists():
        pack_cifar.make_up(made_up)
    os.environ["JAXCOMPUTE_DATA_DIR"] = str(made_up)
    return False


# -- a stage -----------------------------------------------------------------------------------------------------------


def begin(name: str, given: argparse.Namespace, seconds: float) -> None:
    """In a process of its own, ended with all that it started after so many seconds."""
    command = [sys.executable, __file__, f"--stage={name}", f"--out={given.out}", *(["--tiny"] if given.tiny else [])]
    for left in (f"{name}.json", stages.KEPT):
        (given.out / left).unlink(missing_ok=True)
    began, why = time.monotonic(), ""
    with (given.out / f"{name}.log").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
            why = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"it took more than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if read(given.out, name) is None:
        leave(given, name, "failed", time.monotonic() - began, why=why, rows=kept(given))
    told = read(given.out, name) or {}
    print(
        f"{name}: {told['state']} after {time.monotonic() - began:.0f} s{told['why'] and ': ' + told['why']}",
        flush=True,
    )


def one(name: str, given: argparse.Namespace) -> int:
    """The stage itself; its result is left as JSON whatever comes of it."""
    began = time.monotonic()
    try:
        facts = STAGES[name].run(given.out, given.tiny)
    except stages.LeftOut as why:
        leave(given, name, "left out", time.monotonic() - began, why=str(why))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
        seconds, told = time.monotonic() - began, traceback.format_exc()
        leave(given, name, "failed", seconds, why=why, rows=kept(given), traceback=told)
        return 1
    else:
        rows = [stages.Row(*row)._asdict() for row in facts.pop("rows")]
        leave(given, name, "done", time.monotonic() - began, rows=rows, facts=facts)
    return 0


def leave(given: argparse.Namespace, name: str, state: str, seconds: float, why: str = "", **told: Any) -> None:
    facts = {"stage": name, "tiny": given.tiny, "state": state, "seconds": seconds, "why": why}
    seen = os.environ.get("JAXCOMPUTE_DATA_DIR") == str(given.out / MADE_UP)
    facts["made_up"] = seen and STAGES[name].images == "any"
    log.write_json(given.out / f"{name}.json", facts | told)


def kept(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures that a stage had when it failed or was ended, where it keeps them."""
    return (log.read_json(given.out / stages.KEPT) or {"rows": []})["rows"]


def read(out: Path, name: str) -> dict[str, Any] | None:
    return log.read_json(out / f"{name}.json")


# -- all of them -------------------------------------------------------------------------------------------------------


def summarise(given: argparse.Namespace) -> None:
    """Anew after each stage, so that nothing is lost where the time runs out."""
    out, back = given.out, given.back
    told = {name: found | {"log": tail(out / f"{name}.log")} for name in STAGES if (found := read(out, name))}
    found = this_machine()
    log.write_json(out / "summary.json", log.describe({}, tiny=given.tiny, **found, stages=told))
    words = found["words"] + ["tiny: speeds mean nothing"] * given.tiny
    if made_up := [name for name, one in told.items() if one.get("made_up")]:
        words.append(f"CIFAR-10's images made up for {', '.join(made_up)}")
    log.replace_file(out / "summary.txt", text(told, words))
    if back:
        back.mkdir(parents=True, exist_ok=True)
        for file in (out / "summary.json", out / "summary.txt", out / stages.TRACE):
            if file.exists() and file.stat().st_size < 2**24:
                shutil.copy(file, back / file.name)


def tail(file: Path, most: int = 10_000) -> str:
    return file.read_text(errors="replace")[-most:] if file.exists() else ""


def text(told: dict[str, Any], words: list[str]) -> str:
    """What became of each stage, and all figures."""
    became = [(name, found["state"], f"{found['seconds']:.0f}", found["why"][:90]) for name, found in told.items()]
    reached = {None: "", True: "yes", False: "NO"}
    figures = [
        (name, row["what"], shown(row["value"]), row["unit"], row["goal"], reached[row["holds"]])
        for name, found in told.items()
        for row in found.get("rows", ())
    ]
    parts = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {', '.join(words)}",
        log.table(became, ("stage", "state", "s", "why")),
        log.table(figures, ("stage", "figure", "value", "unit", "goal", "reached")),
    ]
    return "\n\n".join(parts) + "\n"


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def this_machine() -> dict[str, Any]:
    """Chip, driver and versions, and the same in words; without jax, which would take the GPU's memory."""
    versions = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "torch", "triton", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    try:
        driver = nvml.driver()
        chips = [f"{gpu.name} of {gpu.memory / 2**30:.0f} GiB and {gpu.power_cap or 0:.0f} W" for gpu in driver.gpus]
        facts = {"chips": chips, "driver": driver.version, "cuda": driver.cuda}
        words = [*chips, f"driver {driver.version}"]
    except nvml.Missing as error:
        facts, words = {"driver": str(error)}, [machine.processor()]
    words += [f"{name} {version}" for name, version in versions.items()]
    return {"machine": facts, "packages": versions, "words": words}


if __name__ == "__main__":
    main()

"""The GPU suite: all that is to be measured on one NVIDIA GPU, in stages, by one command.

    python benchmarks/gpu.py --out=DIR                                  every stage, those of most worth first
    python benchmarks/gpu.py --out=DIR --limit_s=500 --pieces=PIECES    within so many seconds, CIFAR-10 unpacked first
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --out=DIR --tiny         proof that all of it runs, on any machine

A stage (gpu_stages.py) has a process of its own, and a folder DIR/<stage> with told.json and log.txt. The same command
goes on: what is done on this chip is not done again, what failed or was ended is, and keeps the figures that it had
until there are others. A stage that would not fit into the time that is left is not begun. DIR/summary.txt and
summary.json have the figures of all stages; they, the pictures and a packed trace are also copied to --back. Nothing is
fetched: the machine needs jax, flax, optax and orbax, and for the peers PyTorch. CIFAR-10 comes from the data folder or
from the two pieces of pack_cifar.py; without it made-up images serve, but for the speedruns and the whole trainings,
which are left out.

Its figures on a GPU are open: it has been run on the CPU alone, where speed means nothing.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import threading
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
    seconds: float  # that it takes on an H100, estimated; it is ended after three times as many, or LONGEST
    images: Literal["none", "any", "real"] = "none"  # of CIFAR-10


LONGEST = 480.0  # seconds of a stage
STAGES = {
    "correct": Stage(stages.correct, 90),
    "peers_resnet18": Stage(partial(stages.peers, works="resnet18_b256", goal=1.2), 90),
    "peers_resnet50": Stage(partial(stages.peers, works="resnet50", goal=1.2), 240),
    "speedrun": Stage(stages.speedrun, 100, "real"),
    "speedrun_torch": Stage(stages.speedrun_torch, 150, "real"),
    "roofs": Stage(stages.roofs, 130),
    "deterministic": Stage(stages.deterministic, 80),
    "restore": Stage(stages.restore, 40),
    "resume": Stage(stages.resume, 45),
    "training18": Stage(partial(stages.training, depth=18), 150, "real"),
    "sweep": Stage(stages.sweep, 200, "any"),
    "training20": Stage(partial(stages.training, depth=20), 90, "real"),
    "peers_resnet18_f32": Stage(partial(stages.peers, works="resnet18_b256", precisions="float32,tf32"), 150),
    "peers_small": Stage(partial(stages.peers, works="mlp,lenet,cnn,resnet20"), 200),
    "layers": Stage(stages.layers, 120),
    "loops": Stage(stages.loops, 90, "any"),
    "profile": Stage(stages.profiled, 45, "any"),
    "doctor": Stage(stages.doctor, 25),
    "inference": Stage(partial(stages.peers, works="resnet18_b256", jobs="1,32,256"), 80),
    "benchmark": Stage(stages.benchmarked, 240, "any"),
}

MADE_UP = "made_up"  # folder of images that stand for CIFAR-10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is left")
    parser.add_argument("--stages", default=",".join(STAGES), help="by default all: %(default)s")
    parser.add_argument("--limit_s", type=float, default=float("inf"), help="seconds for all of it")
    parser.add_argument("--pieces", type=Path, help="folder of the pieces of CIFAR-10, or of one of them, or of none")
    parser.add_argument("--back", type=Path, help="also copy the summary, the pictures and the trace there")
    parser.add_argument("--tiny", action="store_true", help="small nets, few steps: only that it runs")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out = given.out.absolute()
    if given.stage:
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
        sys.exit(one(given.stage, given))
    names = given.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages={','.join(unknown)}: there are {', '.join(STAGES)}")
    suite(names, given)


def suite(names: list[str], given: argparse.Namespace) -> None:
    """The stages one after the other, those that are done left alone."""
    end = time.monotonic() + given.limit_s
    given.out.mkdir(parents=True, exist_ok=True)
    # what one stage compiles serves others
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.out / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    real = bring_images(given, {STAGES[name].images for name in names})
    for name in names:
        stage, left = STAGES[name], end - time.monotonic()
        told = alike(given, name)
        if told and told["state"] == "done":
            print(f"{name}: done before", flush=True)
        elif stage.seconds > left:
            need = f"it takes some {stage.seconds:.0f} s and {max(0, left):.0f} s are left"
            print(f"{name}: not begun, as {need}", flush=True)
        elif stage.images == "real" and not (real or given.tiny):
            start(given, name)
            leave(given, name, "left out", why="CIFAR-10 is not here: bring both pieces, --pieces=DIR")
        else:
            print(f"{name}: some {stage.seconds:.0f} s on an H100", flush=True)
            begin(name, given, min(left, 3 * stage.seconds, LONGEST))
        summarise(given, names)
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
    """A stage, and whatever comes of it is told."""
    began = time.monotonic()
    start(given, name)
    why = ended(name, given, seconds)
    if told(given, name)["state"] == "begun":
        leave(given, name, "failed", seconds=time.monotonic() - began, why=why)
    found = told(given, name)
    print(
        f"{name}: {found['state']} after {time.monotonic() - began:.0f} s{found['why'] and ': ' + found['why']}",
        flush=True,
    )


def ended(name: str, given: argparse.Namespace, seconds: float) -> str:
    """A stage in a process of its own, ended with all that it started after so many seconds; how it ended."""
    command = [sys.executable, __file__, f"--stage={name}", f"--out={given.out}", *(["--tiny"] if given.tiny else [])]
    with (given.out / name / "log.txt").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return f"its process ended with exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"it took more than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_with(suite: int) -> None:
    """A suite that is killed takes its stage along, which else would keep the GPU's memory."""
    while os.getppid() == suite:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def one(name: str, given: argparse.Namespace) -> int:
    """The stage itself, in its process."""
    began, state, why = time.monotonic(), "done", ""
    try:
        stages.keep(given.out / name, **STAGES[name].run(given.out / name, given.tiny))
    except stages.LeftOut as error:
        state, why = "left out", str(error)
    except stages.Unfinished as error:
        state, why = "unfinished", str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        state, why = "failed", f"{type(error).__name__}: {error}"
    leave(given, name, state, seconds=time.monotonic() - began, why=why)
    return int(state == "failed")


def start(given: argparse.Namespace, name: str) -> None:
    """Told anew, with the figures of an earlier try."""
    before = alike(given, name) or {"rows": [], "facts": {}}
    (given.out / name).mkdir(exist_ok=True)
    made_up = os.environ.get("JAXCOMPUTE_DATA_DIR") == str(given.out / MADE_UP) and STAGES[name].images == "any"
    facts = {"stage": name, "tiny": given.tiny, "state": "begun", "seconds": 0.0, "why": "", "made_up": made_up}
    facts |= {"machine": this_machine(), "rows": before["rows"], "facts": before["facts"]}
    log.write_json(given.out / name / stages.TOLD, facts)


def leave(given: argparse.Namespace, name: str, state: str, **facts: Any) -> None:
    log.write_json(given.out / name / stages.TOLD, told(given, name) | {"state": state} | facts)


def told(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """What a stage has left; nothing where it never began."""
    return log.read_json(given.out / name / stages.TOLD) or {}


def alike(given: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """The same, if it was on this chip and of this size."""
    found = told(given, name)
    same = found and stages.where(found) == stages.where({"machine": this_machine(), "tiny": given.tiny})
    return found if same else None


# -- all of them -------------------------------------------------------------------------------------------------------


def summarise(given: argparse.Namespace, names: list[str]) -> None:
    """Anew after each stage, so that nothing is lost where the time runs out."""
    out, back, here = given.out, given.back, this_machine()
    all_told = {name: found | {"log": tail(out / name / "log.txt")} for name in STAGES if (found := told(given, name))}
    log.write_json(out / "summary.json", log.describe({}, tiny=given.tiny, machine=here, stages=all_told))
    words = [*here["chips"], f"driver {here['driver']}", *(f"{name} {of}" for name, of in here["packages"].items())]
    words += ["tiny: speeds mean nothing"] * given.tiny
    if made_up := [name for name, one in all_told.items() if one["made_up"]]:
        words.append(f"CIFAR-10's images made up for {', '.join(made_up)}")
    never = {name: {"state": "not begun", "seconds": 0.0, "why": "", "machine": here} for name in names}
    log.replace_file(out / "summary.txt", text(never | all_told, words, here["chips"]))
    if back:
        back.mkdir(parents=True, exist_ok=True)
        for file in (out / "summary.json", out / "summary.txt", *out.glob(f"*/{stages.TRACE}"), *out.glob("*/*.png")):
            if file.exists() and file.stat().st_size < 2**24:
                shutil.copy(file, back / f"{file.parent.name}-{file.name}" if file.parent != out else back)


def tail(file: Path, most: int = 10_000) -> str:
    return file.read_text(errors="replace")[-most:] if file.exists() else ""


def text(told: dict[str, Any], words: list[str], chips: list[str]) -> str:
    """What became of each stage, and all figures."""
    became = [
        (name, found["state"], f"{found['seconds']:.0f}", found["why"][:90], on(found, chips))
        for name, found in told.items()
    ]
    reached = {None: "", True: "yes", False: "NO"}
    figures = [
        (name, row["what"], shown(row["value"]), row["unit"], row["goal"], reached[row["holds"]])
        for name, found in told.items()
        for row in found.get("rows", ())
    ]
    parts = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {', '.join(words)}",
        log.table(became, ("stage", "state", "s", "why", "on another chip")),
        log.table(figures, ("stage", "figure", "value", "unit", "goal", "reached")),
    ]
    return "\n\n".join(parts) + "\n"


def on(found: dict[str, Any], chips: list[str]) -> str:
    there = found["machine"]["chips"]
    return "" if there == chips else ", ".join(there)


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@functools.cache
def this_machine() -> dict[str, Any]:
    """Chips, driver and versions; without jax, which would take the GPU's memory."""
    versions = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "torch", "triton", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    try:
        driver = nvml.driver()
        chips = [f"{gpu.name} of {gpu.memory / 2**30:.0f} GiB and {gpu.power_cap or 0:.0f} W" for gpu in driver.gpus]
        return {"chips": chips, "driver": driver.version, "cuda": driver.cuda, "packages": versions}
    except nvml.Missing as error:
        return {"chips": [machine.processor()], "driver": f"none: {error}", "cuda": "", "packages": versions}


if __name__ == "__main__":
    main()

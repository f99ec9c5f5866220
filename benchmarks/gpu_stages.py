"""What the GPU suite measures, a function a stage; gpu.py runs each in a process of its own.

A stage is given a folder of its own, `out`, and whether it is only to prove that it runs, `tiny`. It returns `rows`,
the figures with their goals, and what else is worth keeping, where it hasn't kept them before, lest it be ended. Where
something it needs is missing, it raises LeftOut; where its time is up before all is measured, Unfinished.
"""

import argparse
import contextlib
import dataclasses
import gzip
import importlib
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxcompute import log
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]
TRACE = "trace.xplane.pb.gz"
TOLD = "told.json"  # all that a stage has to tell, in its folder
Facts = dict[str, Any]


class LeftOut(Exception):
    """A stage can't be run here, and why."""


class Unfinished(Exception):
    """A stage is to go on in another run, and what is left."""


class Row(NamedTuple):
    """A figure, and where there is a goal whether it is reached."""

    what: str
    value: Any
    unit: str = ""
    goal: str = ""
    holds: bool | None = None


def at_least(goal: float, what: str, value: float, unit: str = "") -> Row:
    return Row(what, value, unit, f">= {goal:g}", value >= goal)


def at_most(goal: float, what: str, value: float, unit: str = "") -> Row:
    return Row(what, value, unit, f"<= {goal:g}", value <= goal)


def equal(what: str, same: bool) -> Row:
    return Row(what, "equal" if same else "differ", goal="equal", holds=same)


NOT_RUN = "not run"


def keep(out: Path, rows: Iterable[Sequence[Any]], **facts: Any) -> None:
    """The figures so far, in place of others of their names, which are not lost where the stage is ended."""
    told = kept(out)
    found = {row["what"]: row for row in [*told["rows"], *(Row(*row)._asdict() for row in rows)]}
    log.write_json(out / TOLD, told | {"rows": [*found.values()], "facts": told["facts"] | facts})


def kept(out: Path) -> Facts:
    return {"rows": [], "facts": {}} | (log.read_json(out / TOLD) or {})


def promise(out: Path, *rows: Row) -> None:
    """Goals count as missed until they are measured, whatever ends the stage."""
    before = [Row(**row) for row in kept(out)["rows"]]
    keep(out, [*(row._replace(value=NOT_RUN, holds=False) for row in rows), *before])


def where(told: Facts) -> tuple[Any, ...]:
    """Figures of different ones are not to be compared."""
    return told["machine"]["chips"], told["tiny"]


# -- does it compute the same? -----------------------------------------------------------------------------------------


class First(NamedTuple):
    """What a net gives at first, on one device."""

    logits: Any
    gradient: Any
    losses: list[float]  # of the first steps


# On the CPU bfloat16's gradient of ResNet-18 is 0.24 from float32's, of ResNet-20 0.05, of the others 0.03.
FLOAT32 = {"logits": 1e-4, "gradient": 1e-2, "first loss": 1e-5, "second loss": 1e-4}  # relative distances, at most
BFLOAT16 = {"logits": 0.1, "gradient": 0.5, "first loss": 0.02, "second loss": 0.1}


def correct(out: Path, tiny: bool) -> Facts:
    """Nets on this device and on the CPU, from the same weights: float32 in full precision, and bfloat16."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxcompute.data import order

    jax.config.update("jax_default_matmul_precision", "highest")
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    half = "bfloat16" if here.platform == "gpu" else "float32"
    names = ["tiny", "tiny_resnet"] if tiny else ["mlp", "lenet", "cnn", "resnet20", "resnet18"]

    def compare(name: str) -> list[Row]:
        wanted = first(name, "float32", cpu)
        rows = apart_rows(f"{name}, float32", wanted, first(name, "float32", here), FLOAT32)
        return rows + apart_rows(f"{name}, {half} beside the CPU's float32", wanted, first(name, half, here), BFLOAT16)

    with ThreadPoolExecutor() as pool:  # as most of the time is compiling
        rows = []
        for found in pool.map(compare, names):
            rows += found
            keep(out, rows)
    for size, batch in ((50_000, 2000), (1797, 128)):
        drawn = jax.jit(lambda step, size=size, batch=batch: order.indices(7, step, batch, size, jnp))
        same = [np.array_equal(drawn(jnp.int32(at)), order.indices(7, at, batch, size, np)) for at in (0, 26, 100_000)]
        rows.append(equal(f"order of {size:,} examples beside numpy's", all(same)))
    return {"rows": rows}


def first(name: str, precision: str, device: Any) -> First:
    import jax
    import numpy as np
    from jax.flatten_util import ravel_pytree

    from benchmarks import side_by_side
    from jaxcompute import metrics, step

    cpu = jax.devices("cpu")[0]
    start = jax.device_get(programmed(side_by_side.experiment(name, "float32"), cpu).init())  # a GPU's differ in a bit
    program = programmed(side_by_side.experiment(name, precision), device)
    exp = program.exp

    def placed() -> Any:
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, program.abstract)

    @jax.jit
    def look(state: Any, feed: Any) -> Any:
        batch = exp.prepare(exp.train.batch(feed, state.step), state.key, True)
        logits, _ = step.forward(exp, state.params, state.mutable, batch["image"], train=True, key=state.key)
        return logits, ravel_pytree(step.gradient(exp, state, batch, state.key)[0])[0]

    logits, gradient = (np.asarray(x, np.float64) for x in look(placed(), program.feed(0)))
    state, losses = placed(), []
    for at in range(5):
        state, sums = program.steps(1)(state, program.sums(), program.feed(at))
        losses.append(float(metrics.compute(jax.device_get(sums))["loss"]))
    return First(logits, gradient, losses)


def apart_rows(what: str, wanted: First, found: First, limits: dict[str, float]) -> list[Row]:
    import numpy as np

    def far(a: Any, b: Any) -> float:
        return float(np.linalg.norm(np.subtract(b, a)) / np.linalg.norm(a))

    distances = {
        "logits": far(wanted.logits, found.logits),
        "gradient": far(wanted.gradient, found.gradient),
        "first loss": far(wanted.losses[0], found.losses[0]),
        "second loss": far(wanted.losses[1], found.losses[1]),
    }
    rows = [at_most(limits[kind], f"{what}: {kind} apart", distance) for kind, distance in distances.items()]
    return [*rows, Row(f"{what}: fifth loss apart", far(wanted.losses[4], found.losses[4]))]


def programmed(exp: Any, device: Any = None) -> Any:
    """An experiment compiled for one device."""
    import jax

    from jaxcompute import sharding, train

    mesh = sharding.make_mesh(dataclasses.replace(exp.config, mesh_data=1), [device or jax.devices()[0]])
    return train.compile(train.resolve(exp, mesh), mesh)


# -- do checkpoints come back? -----------------------------------------------------------------------------------------


def resume(out: Path, tiny: bool) -> Facts:
    """A run that goes on from its checkpoint, beside the unbroken one; with deterministic operations."""
    from benchmarks import side_by_side
    from jaxcompute import checkpoint, sharding, train

    sharding.make_deterministic()
    rows = []
    for name in ["tiny_resnet"] if tiny else ["mlp", "resnet20"]:
        exp = side_by_side.experiment(name, "auto")
        fields = {"steps": 16, "save_every": 8, "log_every": 4, "eval_every": 10**9, "steps_per_call": 4}
        exp = dataclasses.replace(exp, config=dataclasses.replace(exp.config, **fields), steps=16)
        whole, again = (out / f"{name}-{kind}" for kind in ("whole", "again"))
        for folder in (whole, again):
            shutil.rmtree(folder, ignore_errors=True)
        train.fit(exp, whole, say=print)
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "16")
        train.fit(exp, again, say=print)
        digests = {checkpoint.manifest(folder / "checkpoints", 16)["digest"] for folder in (whole, again)}
        rows.append(equal(f"{name}: State after going on at step 8", len(digests) == 1))
    return {"rows": rows}


def restore(out: Path, tiny: bool) -> Facts:
    """Saved here, restored on the CPU, each in a process of its own; the loss of the next step, in full float32."""
    names = ["tiny", "tiny_resnet"] if tiny else ["mlp", "resnet20"]
    saved = called("save", {"out": str(out), "names": names})
    restored = called("come_back", {"out": str(out), "names": names}, JAX_PLATFORMS="cpu")
    rows = []
    for name in names:
        rows.append(equal(f"{name}: parameters and all of State", saved[name]["digest"] == restored[name]["digest"]))
        loss, other = saved[name]["loss"], restored[name]["loss"]
        rows.append(at_most(1e-6, f"{name}: loss of the next step, apart", abs(other - loss) / abs(loss)))
    return {"rows": rows, "saved": saved, "restored": restored}


def save(out: str, names: list[str]) -> Facts:
    """Of `restore`: three steps, a checkpoint, and the loss of the fourth."""
    from benchmarks import side_by_side
    from jaxcompute import checkpoint

    found = {}
    for name in names:
        program, folder = programmed(exact(side_by_side.experiment(name, "float32"))), Path(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        state = program.init()
        for at in range(3):
            state, _ = program.steps(1)(state, program.sums(), program.feed(at))
        with checkpoint.Saver(folder) as saver:
            saver.save(state)
        found[name] = {"digest": checkpoint.digest(state), "loss": next_loss(program, state)}
    return found


def come_back(out: str, names: list[str]) -> Facts:
    """Of `restore`: the checkpoints that `save` left."""
    from benchmarks import side_by_side
    from jaxcompute import checkpoint

    found = {}
    for name in names:
        program = programmed(exact(side_by_side.experiment(name, "float32")))
        state = checkpoint.restore(Path(out, name), 3, program.abstract)
        found[name] = {"digest": checkpoint.digest(state), "loss": next_loss(program, state)}
    return found


def exact(exp: Any) -> Any:
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    return exp


def next_loss(program: Any, state: Any) -> float:
    import jax

    from jaxcompute import metrics

    _, sums = program.steps(1)(state, program.sums(), program.feed(3))
    return float(metrics.compute(jax.device_get(sums))["loss"])


# -- how fast, beside peers? -------------------------------------------------------------------------------------------


def peers(
    out: Path, tiny: bool, works: str, precisions: str = "bfloat16", jobs: str = "train", goal: float | None = None
) -> Facts:
    """side_by_side.py's comparison: ours, plain Linen, PyTorch eager and torch.compile.

    Args:
        goal: of the steps, how many times as fast ours is to be as torch.compile's.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # before jax starts: PyTorch needs memory too
    from benchmarks import side_by_side

    if tiny:
        works, precisions, jobs = "tiny_resnet", precisions.replace("bfloat16", "float32"), jobs.replace("32,256", "2")
    cases = {f"{work}, {kind}": (work, kind) for work in works.split(",") for kind in precisions.split(",")}
    if goal:
        promise(out, *(at_least(goal, f"{case}, train: over torch.compile", 0) for case in cases))
    whole = kept(out)["facts"].get("timings", {})  # by case
    for case, (work, precision) in cases.items():
        if case in whole:
            continue
        options = argparse.Namespace(precision=precision, jobs=jobs, compile=True)
        options.rounds, options.seconds = (2, 0.01) if tiny else (9, 0.7)
        others: list[str] = []  # the comparison goes on where one differs: the table tells
        timings = side_by_side.compare(
            work, options, others.append, keep=lambda found, case=case: keep(out, timing_rows(case, found, goal))
        )
        rows = timing_rows(case, timings, goal)
        rows.append(Row(f"{case}: loss and gradient of all", ", ".join(others) or "alike", "", "alike", not others))
        if lost := {timing.who for timing in timings} ^ {"ours", "linen", "torch eager", "torch.compile"}:
            rows.append(Row(f"{case}: left out, see the log", ", ".join(sorted(lost)), "", "none", False))
        if "train" in jobs.split(","):
            rows += peak_rows(case, work, precision, timings)
        whole[case] = [timing._asdict() | {"work": case} for timing in timings]
        keep(out, rows, timings=whole)
    device, versions = side_by_side.facts()
    with contextlib.suppress(Exception):  # without matplotlib, say, the table is there
        drawn = [side_by_side.Timing(**timing) for timings in whole.values() for timing in timings]
        side_by_side.picture(drawn, device, out / "side-by-side.png")
    return {"rows": [], "torch": versions}


def timing_rows(case: str, timings: Sequence[Any], goal: float | None) -> list[Row]:
    from benchmarks import side_by_side

    rows = []
    for timing in timings:
        what = f"{case}, {timing.job}"
        batch = timing.job.partition(" b")[2] or side_by_side.WORKS[timing.work].batch
        rows.append(Row(f"{what}: {timing.who}", int(batch) / timing.ms * 1e3, "examples/s"))
        if timing.who != "ours":
            over = f"{what}: over {timing.who}", timing.ratio
            rows.append(at_least(goal, *over) if goal and timing.who == "torch.compile" else Row(*over))
    return rows


def layers(out: Path, tiny: bool) -> Facts:
    """layers.py's comparison: is each layer that is written by hand faster than Linen's on this chip?"""
    from benchmarks import layers

    others: list[str] = []  # the comparison goes on where one differs: the table tells
    rounds, seconds = (1, 0.01) if tiny else (9, 0.1)
    timings = []
    for timing in layers.compare(["float32", "bfloat16"], rounds, seconds, tiny, others.append):
        timings.append(timing._asdict())
        row = Row(f"{timing.layer}, {timing.what}, {timing.precision}: of the other's time", timing.ratio)
        keep(out, [row], timings=timings)
    return {"rows": [Row("what the layers compute", ", ".join(others) or "alike", "", "alike", not others)]}


def peak_rows(case: str, work: str, precision: str, timings: Sequence[Any]) -> list[Row]:
    from benchmarks import side_by_side
    from jaxcompute.compute import benchmark

    flops = programmed(side_by_side.experiment(work, "float32")).flops()
    peak = benchmark.roofs().flops.get({"tf32": "tensorfloat32"}.get(precision, precision))
    steps = [timing for timing in timings if timing.job == "train" and peak]
    return [Row(f"{case}: {t.who} of the chip's peak", flops / t.ms * 1e3 / peak) for t in steps]


def speedrun(out: Path, tiny: bool) -> Facts:
    """Whole trainings of cifar_speedrun, each with a seed and so a program of its own; its first call is not counted.

    Only the first is compiled without a cache, so that it tells how long that takes.
    """
    import jax

    from jaxcompute import train
    from jaxcompute.data import memory

    promise(out, at_least(0.94, "ours: accuracy, mean", 0))
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    module = importlib.import_module("experiments.cifar_speedrun")
    runs = []
    for seed in range(1 if tiny else 3):
        jax.config.update("jax_compilation_cache_dir", cache if seed else None)
        exp = module.experiment(module.Config(seed=seed, **({"steps": 2, "batch_size": 16} if tiny else {})))
        if tiny:
            few = {name: array[:20] for name, array in exp.eval.arrays.items()}
            exp = dataclasses.replace(exp, eval=memory.in_order(few, 10))
        began = time.perf_counter()
        program = programmed(exp)
        count = 1 if jax.default_backend() == "cpu" else math.gcd(exp.steps, 25)
        call = program.steps(count)
        train.evaluate(program, program.init())
        jax.block_until_ready(call(program.init(), program.sums(), program.feed(0)))  # as the peer has run before too
        state, sums = jax.block_until_ready((program.init(), program.sums()))
        ready = time.perf_counter()
        for at in range(0, exp.steps, count):
            state, sums = call(state, sums, program.feed(at))
        jax.block_until_ready(state)
        trained = time.perf_counter()
        accuracy = train.evaluate(program, state)["accuracy"]
        ended = time.perf_counter()
        facts = {"compile_s": ready - began, "train_s": trained - ready, "eval_s": ended - trained}
        runs.append({"seed": seed, **facts, "accuracy": accuracy})
        rows = [*run_rows("ours", runs), Row("ours: compiling and a first call", runs[0]["compile_s"], "s")]
        keep(out, rows, runs=runs)
        print(runs[-1], flush=True)
    return {"rows": []}


def speedrun_torch(out: Path, tiny: bool) -> Facts:
    """The same recipe in PyTorch, in both modes of torch.compile, and what `speedrun` took of the faster's time."""
    promise(out, *(at_most(0.9, f"{what}: ours over torch.compile", 0) for what in PARTS_OF_A_RUN))
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("PyTorch is not installed")
    few = ["--runs=1", "--epochs=1", "--batch_size=16", "--examples=32", "--no-compile"]
    found = kept(out)["facts"].get("found", {})  # by mode
    for mode in ["default"] if tiny else ["default", "max-autotune"]:  # which compiles longer
        if mode not in found:
            command = [sys.executable, str(ROOT / "benchmarks/speedrun_torch.py"), f"--mode={mode}"]
            with tempfile.TemporaryDirectory() as cache:  # of its own and empty, so that the first run compiles
                env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
                ended = subprocess.run(
                    [*command, *(few if tiny else ["--runs=5"])], env=env, stdout=subprocess.PIPE, text=True, check=True
                )
            found[mode] = json.loads(ended.stdout.splitlines()[-1])
        who = f"torch.compile, {mode}" if found[mode]["compiled"] else "torch eager"
        first_run = Row(f"{who}: first run, with compiling", found[mode]["first_run_s"], "s")
        keep(out, [*run_rows(who, found[mode]["runs"]), first_run, *beside(out, found)], found=found)
    return {"rows": []}


PARTS_OF_A_RUN = {"training": ["train_s"], "training and evaluation": ["train_s", "eval_s"]}


def beside(out: Path, found: dict[str, Facts]) -> list[Row]:
    """What `speedrun` took of PyTorch's time, if it ran on this chip; of torch.compile's where that runs."""
    own = kept(out.parent / "speedrun")
    runs, why = own["facts"].get("runs"), "speedrun left no runs"
    if runs and where(own) != where(kept(out)):
        runs, why = None, f"speedrun was on {own['machine']['chips']}{', tiny' * own['tiny']}"
    compiled = any(one["compiled"] for one in found.values())
    rows = []
    for what, parts in PARTS_OF_A_RUN.items():
        if runs is None:
            rows.append(Row(f"{what}: ours over torch.compile", f"{NOT_RUN}: {why}", "", "<= 0.9", False))
            continue
        ours = took(runs, parts)
        theirs = min(took(one["runs"], parts) for one in found.values() if one["compiled"] or not compiled)
        row = Row(f"{what}: ours over torch eager", ours / theirs)
        rows.append(at_most(0.9, f"{what}: ours over torch.compile", ours / theirs) if compiled else row)
    return rows


def took(runs: list[Facts], parts: list[str]) -> float:
    return median([sum(run[part] for part in parts) for run in runs])


def run_rows(who: str, runs: list[Facts]) -> list[Row]:
    return [
        Row(f"{who}: runs", len(runs)),
        *(Row(f"{who}: {what}, median", took(runs, parts), "s") for what, parts in PARTS_OF_A_RUN.items()),
        at_least(0.94, f"{who}: accuracy, mean", statistics.mean(run["accuracy"] for run in runs)),
    ]


median = statistics.median


TRAININGS = {
    18: (0.955, ["batch_size=512", "epochs=60", "muon=0.08", "label_smoothing=0.1"]),
    20: (0.92, ["batch_size=256", "epochs=80", "muon=0.04", "small_epochs=56"]),
}


def training(out: Path, tiny: bool, depth: int) -> Facts:
    """cifar_resnet by launch.py, to its end: the wide form, or depth 20."""
    goal, fields = TRAININGS[depth]
    what = f"depth {depth}, {', '.join(fields)}"
    promise(out, at_least(goal, f"{what}: accuracy", 0))
    fields = ["padding=4", "eval_every=1000000", f"depth={depth}", *fields]
    fields += ["depth=20", "steps=2", "batch_size=8", "small_epochs=0"] * tiny
    workdir, began = out / "run", time.perf_counter()
    shutil.rmtree(workdir, ignore_errors=True)  # what goes on in the midst of it would not tell how long it takes
    flags = [f"--config.{field}" for field in fields]
    code, text = launched("--experiment=cifar_resnet", *flags, f"--workdir={workdir}")
    if code:
        raise RuntimeError(text)
    steps = log.read(workdir)
    accuracy = at_least(goal, f"{what}: accuracy", steps[max(steps)]["eval/accuracy"])
    return {"rows": [accuracy, Row(f"{what}: from command to end", time.perf_counter() - began, "s")]}


# -- what do its settings give? ----------------------------------------------------------------------------------------


def sweep(out: Path, tiny: bool, seconds: float = 150) -> Facts:
    """Steps in one call, and precisions, of cifar_resnet and an MLP; no point begins after so many seconds."""

    from benchmarks import side_by_side
    from jaxcompute.compute import benchmark

    nets, kinds = ("depth 18", "depth 20", "mlp"), ("bfloat16", "tensorfloat32", "float32")
    points = [("depth 18", kind, 8) for kind in kinds]
    points += [(name, "bfloat16", count) for count in (8, 1, 25, 2, 4) for name in nets[::-1]]
    points += [(name, kind, 8) for name in nets[1:] for kind in kinds[1:]]
    points = [("tiny", "float32", count) for count in (1, 2)] if tiny else points
    whats = {f"{name}, {kind}, {count} steps a call": (name, kind, count) for name, kind, count in points}
    found = kept(out)["facts"].get("points", {})
    roofs = benchmark.roofs(0.1 if tiny else 2.0)
    end = time.perf_counter() + seconds
    for what, (name, kind, count) in whats.items():
        if what in found or time.perf_counter() > end:
            continue
        exp = side_by_side.experiment(name, "float32") if "depth" not in name else cifar_resnet(name[-2:])
        setting = benchmark.Setting(kind, exp.config.batch_size, 1, count)  # pyright: ignore[reportArgumentType]
        point = benchmark.measure(exp, setting, roofs, 0.1 if tiny else 1.0)
        found[what] = {"net": name, **point._asdict(), "setting": setting._asdict()}
        row = Row(what, point.examples_per_sec, "examples/s")
        keep(out, [row], points=found)
        print(row, flush=True)
    if left := len(whats.keys() - found):
        raise Unfinished(f"{left} of {len(whats)} points are left")
    return {"rows": [], "roofs": roofs._asdict()}


def cifar_resnet(depth: str) -> Any:
    module = importlib.import_module("experiments.cifar_resnet")
    return module.experiment(module.Config(depth=depth, batch_size=128 if depth == "20" else 256, mesh_data=1))


CONVOLVED, JOINED = 11_113_984, 5_519_360  # numbers an image that ResNet-50's convolutions and its blocks' sums give


def bandwidth_roof(bandwidth: float) -> float:
    """Images/s that ResNet-50 can be trained with in bfloat16 at 224 pixels, if memory traffic is all that takes time.

    What a convolution gives passes the memory 14 times. Forward 5: written; read for the batch norm's mean and
    variance; read and written by its normalisation with the ReLU; read by the next convolution. Backward 9: the
    gradient written by that convolution; it and the number read for the batch norm's two sums; both read again and the
    norm's gradient written; that read for the gradients of the kernel and of the input; the convolution's input read
    for its kernel. A block's sum is 4 more: the short cut read; backward, two gradients read and their sum written.
    Weights, pooling and the images themselves are some 2 % more and left out. So an image moves
    2 bytes * (14 * 11,113,984 + 4 * 5,519,360) = 355 MB: 9,400 images/s at an H100's 3.35 TB/s, 13,500 at an H200's
    4.8 TB/s.

    Args:
        bandwidth: bytes/s of the chip's memory.
    """
    return bandwidth / (2 * (14 * CONVOLVED + 4 * JOINED))


def roofs(out: Path, tiny: bool) -> Facts:
    """ResNet-50 below the roof of its activations; it and ResNet-18 below ceilings measured here; memory and joules.

    Without command buffers, whose kernels a trace does not name by instruction.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="  # before jax starts
    import jax

    from benchmarks import side_by_side
    from jaxcompute.compute import benchmark, profile, roofline

    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # as `profile` does: one compilation less
    goal = partial(at_least, 0.75, "resnet50: examples/s, of what the bandwidth allows its activations")
    if not tiny:
        promise(out, goal(0))
    precision, seconds = ("float32", 0.1) if tiny else ("bfloat16", 1.0)
    left = {}
    for name in ["tiny_resnet"] if tiny else ["resnet50", "resnet18_b256"]:
        exp = side_by_side.experiment(name, precision)
        top = benchmark.roofs(seconds)
        point = benchmark.measure(exp, benchmark.Setting(precision, exp.config.batch_size), top, seconds)
        rows = [goal(point.examples_per_sec / bandwidth_roof(top.bandwidth))] if name == "resnet50" else []
        rows += [
            Row(f"{name}: of the datasheet's peak", point.mfu),
            Row(f"{name}: of the datasheet's bandwidth, by XLA's count of bytes", point.bandwidth),
            Row(f"{name}: examples/s", point.examples_per_sec, "examples/s"),
            Row(f"{name}: energy", point.joules, "J/example"),
            Row(f"{name}: memory predicted", point.predicted, "B"),
            Row(f"{name}: memory at most", point.measured, "B"),
        ]
        keep(out, rows)
        traced = profile.run(exp, out / name, seconds)
        roof = roofline.run(traced, seconds=seconds)
        print(f"{name}\n{profile.text(traced)}\n\n{roofline.text(roof)}", flush=True)
        unnamed = sum(op.ms for op in traced.ops if not op.bytes) / (sum(op.ms for op in traced.ops) or 1)
        rows = [
            Row(f"{name}: bytes a second by its instructions, of the bandwidth measured here", moved(roof)),
            Row(f"{name}: of the time in operations that are no known instruction", unnamed),
            Row(f"{name}: of its roof, by its instructions", roof.share(roof.step)),
            Row(f"{name}: the device idle", traced.idle),
        ]
        left[name] = {"point": point._asdict(), "roofline": roofline.to_json(roof)}
        left[name]["by_kind"], left[name]["by_place"] = profile.by(traced, "kind"), profile.by(traced, "place")[:40]
        keep(out, rows, nets=left)
    return {"rows": []}


def moved(roof: Any) -> float:
    return 1e3 * roof.step.bytes / roof.step.ms / roof.bandwidth


def deterministic(out: Path, tiny: bool) -> Facts:
    """A step with and without XLA's deterministic operations, and whether two runs give equal bits."""
    names = ["tiny_resnet"] if tiny else ["resnet18_b256", "lenet"]
    free, bound = (called("timed", {"names": names, "tiny": tiny, "bound": bound}) for bound in (False, True))
    rows = []
    for name in names:
        rows += [
            Row(f"{name}: time with deterministic operations, over without", bound[name]["ms"] / free[name]["ms"]),
            equal(f"{name}: two runs with them", len(set(bound[name]["digests"])) == 1),
            Row(f"{name}: two runs without them", ["differ", "equal"][len(set(free[name]["digests"])) == 1]),
        ]
    return {"rows": rows, "without": free, "with": bound}


def timed(names: list[str], tiny: bool, bound: bool) -> Facts:
    """Of `deterministic`: milliseconds a step, and the States of two runs of twenty steps."""
    from benchmarks import side_by_side
    from jaxcompute import checkpoint, sharding
    from jaxcompute.compute import benchmark

    if bound:
        sharding.make_deterministic()
    precision, count, seconds = ("float32", 1, 0.1) if tiny else ("bfloat16", 4, 1.5)
    found = {}
    for name in names:
        exp = side_by_side.experiment(name, precision)
        setting = benchmark.Setting(precision, exp.config.batch_size, 1, count)
        point = benchmark.measure(exp, setting, benchmark.roofs(seconds), seconds)
        program, digests = programmed(benchmark.placed(exp, setting)), []
        for _ in range(2):
            state = program.init()
            for at in range(0, 20, count):
                state, _ = program.steps(count)(state, program.sums(), program.feed(at))
            digests.append(checkpoint.digest(state))
        found[name] = {"ms": point.ms, "digests": digests}
    return found


def loops(out: Path, tiny: bool) -> Facts:
    """The training loop beside its bare compiled call."""
    from benchmarks import loop

    goals = {"mlp_784": 0.98, "digits_mlp": 0.9, "cifar_resnet": 0.98}
    sizes = {"mlp_784": 8, "digits_mlp": 40} if tiny else {"mlp_784": 4000, "digits_mlp": 8000, "cifar_resnet": 800}
    promise(out, *(at_least(goals[name], f"{name}: bare over loop", 0) for name in sizes))
    rows, left = [], []
    for name, steps in sizes.items():
        try:
            found = loop.measure(name, argparse.Namespace(steps=steps, turns=1 if tiny else 5))
        except BadInput as error:  # no scikit-learn, and no digits
            rows.append(Row(name, f"left out: {error}"))
            continue
        rows.append(at_least(goals[name], f"{name}: bare over loop", found.share))
        rows += [Row(f"{name}: bare", found.bare_ms, "ms"), Row(f"{name}: gather, augment", found.batch_ms, "ms")]
        left.append(found._asdict())
        keep(out, rows)
    return {"rows": rows, "loops": left}


# -- do the instruments work? ------------------------------------------------------------------------------------------


def doctor(out: Path, tiny: bool) -> Facts:
    """`--mode=doctor`; its page as it is, as a machine that isn't fit is told there."""
    code, text = launched("--mode=doctor", f"--workdir={out}")
    return {"rows": [Row("exit code", code)], "text": text}


def profiled(out: Path, tiny: bool) -> Facts:
    """`--mode=profile` of cifar_resnet, and its trace, packed."""
    folder, name = out / "run", "sigmoid_mlp" if tiny else "cifar_resnet"
    shutil.rmtree(folder, ignore_errors=True)
    code, text = launched(f"--experiment={name}", "--mode=profile", f"--workdir={folder}")
    if code:
        raise RuntimeError(text)
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    with trace.open("rb") as plain, gzip.open(out / TRACE, "wb") as packed:
        shutil.copyfileobj(plain, packed)
    found = json.loads((folder / "profile.json").read_text())
    unknown = sum(op["ms"] for op in found["ops"] if not op["place"]) / (sum(op["ms"] for op in found["ops"]) or 1)
    rows = [
        Row("a step", found["ms"], "ms"),
        Row("the device idle", found["idle"]),
        Row("of the time in instructions of no known layer", unknown),
        Row("its trace, packed", (out / TRACE).stat().st_size, "B"),
    ]
    return {"rows": rows, "text": text}


def benchmarked(out: Path, tiny: bool) -> Facts:
    """`--mode=benchmark` of cifar_resnet."""
    name = "sigmoid_mlp" if tiny else "cifar_resnet"
    code, text = launched(f"--experiment={name}", "--mode=benchmark", f"--workdir={out}")
    if code:
        raise RuntimeError(text)
    found = json.loads((out / "benchmark.json").read_text())
    rows = [
        Row(f"batch {point['setting']['batch_size']:,}", point["examples_per_sec"], "examples/s")
        for point in found["batches"]
    ]
    return {"rows": rows, "text": text, "found": found}


def launched(*flags: str) -> tuple[int, str]:
    """launch.py's exit code and what it said."""
    command = [sys.executable, str(ROOT / "launch.py"), *flags]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(ended.stdout, flush=True)
    return ended.returncode, ended.stdout


def called(name: str, fields: Facts, **env: str) -> Facts:
    """A function of this file in a process of its own."""
    command = [sys.executable, __file__, name, json.dumps(fields)]
    ended = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise RuntimeError(f"{name} failed, see above: exit code {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


PARTS: list[Callable[..., Facts]] = [save, come_back, timed]

if __name__ == "__main__":
    print(json.dumps({part.__name__: part for part in PARTS}[sys.argv[1]](**json.loads(sys.argv[2]))))

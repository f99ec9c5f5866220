"""Compile, evaluate, fit: the only `jax.jit` of the training path and the only loop.

The loop dispatches ahead of the device. Metrics are summed inside the compiled call, fetched once a log period and
written one period late; nothing is computed on device arrays outside of it.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompute import checkpoint, distributed, flops, log, metrics, sharding, step, stops
from jaxcompute.core import Batch, Experiment, Run, Source, State, Writer
from jaxcompute.errors import BadInput, Elsewhere, line_of
from jaxcompute.metrics import Last, Mean, Metrics

# jitted residual blocks give NaN or garbage on processors with AVX-512 bf16; an empty fusion type mends it
BROKEN_BFLOAT16 = ("0.11.2", "0.12.0", "0.12.0.1")
MEND = "--xla_cpu_experimental_ynn_fusion_type="


# fields that a run may go on with changed: what is computed from a State, or seen of it, stays sound
FREE = {"steps", "epochs", "log_every", "eval_every", "save_every", "keep_last", "keep_best"}
FREE |= {"steps_per_call", "mesh_data", "mesh_fsdp", "mesh_model"}


# Calls in flight on several CPU devices: with more than 32 their collectives wait for one another, and after 40 s XLA
# ends the process (jax 0.10.2).
CPU_AHEAD = 16
AHEAD = 2  # streamed batches that are on the devices before they are asked for, and calls dispatched before one is done
IN_USE = 1 + 2 * AHEAD  # streamed batches that may be on the devices at once: one, those ahead and those in flight


class NonFinite(Exception):
    """A loss, gradient or update that is not finite; the message names the step."""


class Preempted(Exception):
    """The run was asked to stop, and has saved its State where it has a work directory; `signum` is the signal."""

    def __init__(self, signum: int, at: int, saved: bool):
        super().__init__(f"stopped by {signal.Signals(signum).name} at step {at:,}" + (", saved" if saved else ""))
        self.signum = signum


class Recompile(Exception):
    """A step was given other shapes or dtypes than it was compiled for; the message names each, old and new."""


class OutOfMemory(Exception):
    """A batch, or the data, needs more memory than the devices have; the message names what to change."""

    def __init__(
        self,
        exp: Experiment,
        mesh: jax.sharding.Mesh,
        need: int | None,
        free: int | None,
        of: Literal["train", "eval", "data"] = "train",
    ):
        config = exp.config
        knobs = ["a smaller --config.batch_size"]
        platform = mesh.devices.flat[0].platform
        if config.accumulate < config.batch_size // sharding.rows(mesh) and platform not in step.UNROLLED:
            knobs.append(f"--config.accumulate={2 * config.accumulate} or more (--fit_memory finds it)")
        if mesh.shape["fsdp"] == 1 and sharding.rows(mesh) > 1:
            knobs.append(f"--config.mesh_fsdp={sharding.rows(mesh)} to split the parameters")
        if config.precision == "float32" and platform == "gpu":
            knobs.append("--config.precision=bfloat16")
        what, mend = {
            "train": (f"--config.batch_size={config.batch_size}", f"take {', or '.join(knobs)}"),
            "eval": (f"an evaluation's batch of {exp.eval.batch_size:,}", "give Experiment.eval a smaller one"),
            "data": ("the data, whole on each device,", "stream it (jaxcompute.data.stream), or take less of it"),
        }[of]
        needs = "does not fit" if need is None else f"needs {log.quantity(need, 'B')} a device"
        room = "" if free is None else f", and {log.quantity(free, 'B')} are free"
        super().__init__(f"{what} {needs}{room}: {mend}")
        self.need, self.free, self.of = need, free, of


class WontFit(OutOfMemory, BadInput):
    """Foreseen: nothing has run, and nothing has been written."""


class Instruments(NamedTuple):
    """What a run may be given to measure itself by. Where one is missing, so is its figure."""

    peak: Callable[[str, str], float | None] = lambda kind, precision: None  # FLOP/s of a device of this kind, at most
    joules: Callable[[], float | None] = lambda: None  # a meter of this host's devices; only differences mean something
    free: int | None = None  # bytes a device that a run may use; None: what the device tells


class Program(NamedTuple):
    """An experiment compiled for a mesh."""

    exp: Experiment
    mesh: jax.sharding.Mesh
    abstract: State  # shapes, dtypes and shardings
    init: Callable[[], State]
    feed: "Feeder"  # what the step's call is given, on the devices
    steps: Callable[[int], Callable[[State, Metrics, Batch], tuple[State, Metrics]]]  # by count; donates state and sums
    compiled: Callable[[int], jax.stages.Compiled]  # what `steps` calls
    sums: Callable[[], Metrics]  # empty sums of the training metrics
    eval_feed: "Feeder"
    eval_step: Callable[[State, Metrics, Batch, np.int32], Metrics]
    eval_sums: Callable[[], Metrics]
    text: Callable[[], str]  # of the step's call as it is lowered: what it computes, and on which mesh
    flops: Callable[[], float]  # of one optimizer step over all devices: matrix products and convolutions
    memory: Callable[[], dict[str, int]]  # bytes a device by what they hold, their sum is the need; {}: not told
    eval_memory: Callable[[], dict[str, int]]  # the same while an evaluation runs; compiles its step

    def close(self) -> None:
        """End the threads and processes that feed it."""
        self.feed.close()
        self.eval_feed.close()


def resolve(exp: Experiment, mesh: jax.sharding.Mesh) -> Experiment:
    """The experiment with every `auto` decided for the mesh, and an evaluation batch that splits over it."""
    cpu = mesh.devices.flat[0].platform == "cpu"
    config = exp.config
    sharding.check_batch(mesh, config)
    if exp.steps * config.batch_size > 2**32:  # the order of examples is counted in uint32
        most = 2**32 // config.batch_size
        raise BadInput(f"{exp.steps:,} steps of --config.batch_size={config.batch_size}: take {most:,} steps at most")
    most = (2**31 - 1) // config.batch_size  # a `metrics.Mean` counts in int32
    if min(config.log_every + config.steps_per_call, exp.steps) > most:
        raise BadInput(
            f"--config.log_every={config.log_every}: of --config.batch_size={config.batch_size} take {most:,} at most"
        )
    for name, source in {"train": exp.train, "eval": exp.eval}.items():
        if source.resident:
            check_labels(name, source.feed(0), len(exp.classes))
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="float32" if cpu else "bfloat16")
    if config.precision == "float64" and not jax.config.read("jax_enable_x64"):
        raise BadInput("precision float64 needs jax.config.update('jax_enable_x64', True) before anything else of jax")
    if config.precision == "bfloat16" and broken_bfloat16(mesh.devices.flat[0].platform):
        jaxlib = importlib.metadata.version("jaxlib")
        raise BadInput(f"bfloat16 on the CPU is broken in jaxlib {jaxlib}: set XLA_FLAGS={MEND}")
    if config.steps_per_call == 0:
        # a rolled loop over convolutions other than those of models/conv.py is some 30 times slower on the CPU; a
        # streamed batch is one step's; what is due within a call is done after it
        most = min(8, exp.steps, config.log_every, eval_period(exp), config.save_every or 8)
        config = dataclasses.replace(config, steps_per_call=1 if cpu or not exp.train.resident else most)
    if config.steps_per_call > 1 and not exp.train.resident:
        raise BadInput(f"--config.steps_per_call={config.steps_per_call}: a streamed batch is one step's; give 1")
    rows = -(-exp.eval.batch_size // sharding.rows(mesh)) * sharding.rows(mesh)
    return dataclasses.replace(exp, config=config, eval=exp.eval.with_batch_size(rows))


def eval_period(exp: Experiment) -> int:
    """Steps between two evaluations: by default an epoch."""
    return exp.config.eval_every or max(1, round(exp.train.size / exp.train.batch_size))


def check_labels(where: str, rows: Mapping[str, np.ndarray], classes: int) -> None:
    """Raises BadInput where a label is no class; a negative one would be taken for one counted from the end."""
    label = rows.get("label")
    if classes and label is not None and label.dtype.kind in "iu":
        wrong = label[(label < 0) | (label >= classes)]
        if wrong.size:
            raise BadInput(f"{where}: a label is {wrong[0]} and there are {classes} classes; count from 0")


def broken_bfloat16(platform: str) -> bool:
    """Whether this jaxlib computes bfloat16 wrongly on such devices, and no flag mends it."""
    jaxlib, flags = importlib.metadata.version("jaxlib"), os.environ.get("XLA_FLAGS", "")
    return platform == "cpu" and jaxlib in BROKEN_BFLOAT16 and MEND not in flags.split()


def compile(exp: Experiment, mesh: jax.sharding.Mesh) -> Program:
    """A resolved experiment for a mesh. `steps(count)` compiles ahead of time: another shape is then an error."""
    train_step, eval_step = exp.train_step or step.train_step, exp.eval_step or step.eval_step
    whole = jax.sharding.NamedSharding(mesh, sharding.WHOLE)

    # These three are jitted for their trace alone: eval_shape makes it, and the calls below find it made.
    @jax.jit
    def init(feed: Batch) -> State:
        return step.init(exp, exp.train.batch(feed, jnp.int32(0)))

    @jax.jit
    def advance(state: State, feed: Batch) -> tuple[State, Metrics]:
        with jax.named_scope("data"):
            batch = sharding.split(mesh, exp.train.batch(feed, state.step))
        new, seen = train_step(exp, state, batch)
        return new, seen | {"step": Last(new.step)}

    @jax.jit
    def measure(state: State, feed: Batch, at: jax.Array) -> Metrics:
        return eval_step(exp, state, sharding.split(mesh, exp.eval.batch(feed, at)))

    def one(state: State, sums: Metrics, feed: Batch) -> tuple[State, Metrics]:
        new, seen = advance(state, feed)
        new, finite = step.keep_finite(state, new, seen)
        return new, jax.tree.map(lambda m, s: jnp.where(finite, m, s), metrics.add(sums, seen), sums)

    def eval_one(state: State, sums: Metrics, feed: Batch, at: jax.Array) -> Metrics:
        return metrics.add(sums, measure(state, feed, at))

    with tells_of_memory(exp, mesh, "data"):
        feed = Feeder(mesh, exp.train, exp.steps, "train", len(exp.classes))
        eval_feed = Feeder(mesh, exp.eval, exp.eval.steps, "eval", len(exp.classes))
    fed, eval_fed = feed.like, eval_feed.like
    plain = jax.eval_shape(init, fed)
    placed = sharding.shardings(mesh, exp.rule, plain)
    abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), plain, placed)
    seen = jax.eval_shape(advance, abstract, fed)[1]
    counted = jax.eval_shape(measure, abstract, eval_fed, np.int32(0))
    if exp.best[0] not in counted:
        raise BadInput(f"Experiment.best ranks by {exp.best[0]!r}, but an evaluation counts {', '.join(counted)}")

    def zeros(shapes: Metrics) -> Callable[[], Metrics]:
        return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=whole)

    @functools.cache
    def traced(count: int) -> jax.stages.Traced:
        def call(state: State, sums: Metrics, feed: Batch) -> tuple[State, Metrics]:
            if count == 1:
                return one(state, sums, feed)
            return jax.lax.scan(lambda carry, _: (one(*carry, feed), None), (state, sums), length=count)[0]

        donated = (0, 1) if exp.train.resident else (0,)
        jitted = jax.jit(call, donate_argnums=donated, out_shardings=(placed, whole))
        return jitted.trace(abstract, jax.tree.map(lambda x: x.update(sharding=whole), seen), fed)

    @functools.cache
    def lowered(count: int) -> jax.stages.Lowered:
        return traced(count).lower()

    @functools.cache
    def compiled(count: int) -> jax.stages.Compiled:
        return lowered(count).compile()

    @functools.cache
    def steps(count: int) -> Callable[[State, Metrics, Batch], tuple[State, Metrics]]:
        return compiled(count) if exp.train.resident else paced(compiled(count))

    def work() -> float:
        count = exp.config.steps_per_call
        return flops.count(traced(count).jaxpr.jaxpr) / count

    measured = jax.jit(eval_one, donate_argnums=1 if exp.eval.resident else (), out_shardings=whole)
    kept = {
        "parameters": sharding.bytes_per_device((abstract.params, abstract.mutable, abstract.ema)),
        "optimizer": sharding.bytes_per_device(abstract.opt_state),
    }

    def memory() -> dict[str, int]:
        m = compiled(exp.config.steps_per_call).memory_analysis()
        if m is None:
            return {}
        total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        made = max(0, total - sum(kept.values()) - sharding.bytes_per_device(fed))
        return kept | {"data": feed.held(IN_USE) + eval_feed.held(0), "activations and temporaries": made}

    def eval_memory() -> dict[str, int]:
        like = jax.tree.map(lambda x: x.update(sharding=whole), counted)
        m = measured.lower(abstract, like, eval_fed, np.int32(0)).compile().memory_analysis()
        if m is None:
            return {}
        made = max(0, m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)
        return kept | {"data": feed.held(1 + AHEAD) + eval_feed.held(IN_USE), "activations and temporaries": made}

    return Program(
        exp=exp,
        mesh=mesh,
        abstract=abstract,
        init=lambda: jax.jit(init, out_shardings=placed)(feed.blank()),
        feed=feed,
        steps=steps,
        compiled=compiled,
        sums=zeros(seen),
        eval_feed=eval_feed,
        eval_step=measured if exp.eval.resident else paced(measured),
        eval_sums=zeros(counted),
        text=lambda: lowered(exp.config.steps_per_call).as_text(),
        flops=work,
        memory=memory,
        eval_memory=eval_memory,
    )


class Feeder:
    """By step, a source's arrays on the devices: placed once where they are resident, else by a thread, ahead of it."""

    def __init__(self, mesh: jax.sharding.Mesh, source: Source, steps: int, name: str = "", classes: int = 0):
        self.source, self.steps, self.name, self.classes = source, steps, name, classes
        self.split = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        self.part = (0, 1) if source.resident else sharding.share(mesh)  # of how many, that this process reads
        self.resident = sharding.put(mesh, sharding.WHOLE, source.feed(0)) if source.resident else None
        self.like: Any = self.resident or {  # what a call is traced with
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.split)
            for name, array in source.like().items()
        }
        self.coming: dict[int, Future[Batch]] = {}
        self.thread = ThreadPoolExecutor(1, "feed")

    def __call__(self, at: int) -> Batch:
        if self.resident is not None:
            return self.resident
        wanted = range(at, max(at + 1, min(at + 1 + AHEAD, self.steps)))
        for other in self.coming.keys() - set(wanted):
            self.coming.pop(other).cancel()
        for coming in wanted:
            if coming not in self.coming:
                self.coming[coming] = self.thread.submit(self._put, coming)
        return self.coming.pop(at).result()

    def _put(self, at: int) -> Batch:
        rows = self.source.feed(at, *self.part)
        self._alike(at, rows)
        check_labels(f"{self.name}: step {at}", rows, self.classes)
        return {
            name: jax.make_array_from_process_local_data(self.split, array, self.like[name].shape)
            for name, array in rows.items()
        }

    def _alike(self, at: int, rows: dict[str, np.ndarray]) -> None:
        """Raises Recompile where a batch has other shapes or dtypes than it was announced with."""
        parts = self.part[1]
        wanted = {name: f"{x.dtype} {[x.shape[0] // parts, *x.shape[1:]]}" for name, x in self.like.items()}
        kinds = {name: f"{x.dtype} {list(x.shape)}" for name, x in rows.items()}
        if kinds != wanted:
            names = [name for name in wanted | kinds if wanted.get(name) != kinds.get(name)]
            changes = "; ".join(f"{name} was {wanted.get(name)} and is {kinds.get(name)}" for name in names)
            mend = "a source gives each batch the same: pad it and mask it, or leave it out"
            raise Recompile(f"the batch of step {at} would compile the step anew: {changes}; {mend}")

    def held(self, batches: int) -> int:
        """Bytes a device: a resident set, or so many batches of a stream."""
        return sharding.bytes_per_device(self.like) * (1 if self.source.resident else batches)

    def blank(self) -> Batch:
        """A batch whose values do not matter."""
        if self.resident is not None:
            return self.resident
        zeros = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.like), out_shardings=self.split
        )
        return zeros()

    def close(self) -> None:
        """End the thread, and what the source has of its own."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.source.close()  # what the thread may be waiting for
        self.thread.shutdown()
        self.source.close()  # what it may have begun at that moment


def paced(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, made once all but the newest AHEAD before it are done.

    Else streamed batches would pile up on a device that is slower than their source, and the loop, far ahead of the
    device, would take its own wait for the next batch for the device's.
    """
    dispatched: collections.deque[jax.Array] = collections.deque()

    def paced_call(*args: Any) -> Any:
        if len(dispatched) == AHEAD:
            jax.block_until_ready(dispatched.popleft())
        outputs = call(*args)
        dispatched.append(jax.tree.leaves(outputs)[-1])  # of the sums, which are not donated here
        return outputs

    return paced_call


def evaluate(program: Program, state: State, signals: Sequence[int] = ()) -> dict[str, Any]:
    """The evaluation set's metrics, every example counted once: floats, and `confusion` [classes, classes].

    A mean over no example is left out. {} where it was broken off, by a signal that came on the way.
    """
    sums, ahead = program.eval_sums(), Ahead(most=in_flight(program.mesh))
    with tells_of_memory(program.exp, program.mesh, "eval"):
        for at in range(program.exp.eval.steps):
            if signals:
                return {}
            distributed.moved()
            feed = program.eval_feed(at)
            ahead.hold(sums)
            sums = program.eval_step(state, sums, feed, np.int32(at))
        fetched = jax.device_get(sums)
    empty = {name for name, metric in fetched.items() if isinstance(metric, Mean) and not metric.weight}
    return metrics.compute({name: metric for name, metric in fetched.items() if name not in empty})


def fit(
    exp: Experiment,
    workdir: Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    write: Writer | None = None,
    say: Callable[[str], None] = print,
    allow_changes: bool = False,
    instruments: Instruments | None = None,
) -> State:
    """Train to the last step and return the State there.

    Args:
        exp: the experiment.
        workdir: where metrics, checkpoints and status go, and where the run goes on from; None leaves nothing.
        mesh: the devices; None: by the config.
        write: is given (step, values) at each log period and evaluation, and (step, {}) at each call in between.
        say: is given each line of what is announced.
        allow_changes: go on in a work directory though fields of FREE, the code (and with it what fields there are) or
            the data have changed.
        instruments: what perf/mfu, perf/joules_per_example and the forecast of memory are measured by.

    Raises:
        BadInput: a config, a mesh or a checkpoint that does not fit, or another run in the work directory.
        NonFinite: a loss, gradient or update was not finite; the checkpoints before it stand; nonfinite/ has that step.
        Preempted: a signal of `stops` came; the State has been saved.
        OutOfMemory: the step doesn't fit the devices' memory, by the forecast before step 0 or as it ran.
        Recompile: the batches changed their shape or dtype under way.
        OSError: a save or a log could not be written.
        Elsewhere: another process failed.
    """
    instruments = instruments or Instruments()
    with stop_signals() as signals, contextlib.ExitStack() as held:
        with distributed.together():
            mesh = mesh or sharding.make_mesh(exp.config)
            if home := home_of(workdir):
                held.enter_context(log.lock(home))
            exp = resolve(exp, mesh)
            if workdir:
                claim(workdir, exp, allow_changes)
            if home:
                checkpoint.clean(home / "checkpoints")  # before any is restored: it puts back what was being replaced

        def ended(kind: Literal["done", "preempted", "failed"], at: int, message: str = "") -> str:
            """The digest of the State that is saved at this step."""
            digest = digest_of(home, at) if home else ""
            if home:
                log.status(home, kind, step=at, of=exp.steps, message=message, digest=digest)
            return digest

        def broken(why: str, kind: Literal["preempted", "failed"] = "failed") -> None:
            with contextlib.suppress(OSError):  # on a full disk the error itself is what to tell
                at = log.read_status(home).get("step", 0) if home else 0
                ended(kind, at, why)

        def lost(why: str) -> None:
            """This process is about to end beside its loop, which may wait for another for ever; a save is finished."""
            if home:
                checkpoint.wait(home / "checkpoints", 60)
            broken(why)

        alike = Preempted, NonFinite
        try:
            with distributed.agreed(signals, alike, lost) as stop, tells_of_memory(exp, mesh, "train"):
                state = loop(exp, workdir, mesh, write, say, signals, stop, allow_changes, instruments)
        except BaseException as error:
            if not isinstance(error, BadInput | Elsewhere) or (home and running(home)):  # else nothing ran
                broken(line_of(error), "preempted" if isinstance(error, Preempted) else "failed")
            raise
        at = int(jax.device_get(state.step))  # beyond the last, where a run was made shorter than it is
        if digest := ended("done", at):
            say(f"State of step {at:,}: {digest}")
        return state


def home_of(workdir: Path | None) -> Path | None:
    """The work directory as this process may write it: process 0 alone does. All read it, so all must see it."""
    return workdir if jax.process_index() == 0 else None


def digest_of(workdir: Path, at: int) -> str:
    """Of the State that was saved at a step; "" where none was."""
    try:
        return checkpoint.manifest(workdir / "checkpoints", at)["digest"]
    except BadInput:
        return ""


def claim(workdir: Path, exp: Experiment, allow_changes: bool) -> None:
    """Refuse a work directory that holds a run of another config, unless it may be changed and was meant to be.

    Raises:
        BadInput: names each field that differs, old and new.
    """
    saved, name = log.read_config(workdir), name_of(exp)
    if saved is None:
        if there := checkpoint.steps(workdir / "checkpoints"):
            mend = "bring it back, or take another --workdir"
            raise BadInput(f"{workdir} has a checkpoint of step {there[-1]} and no config.json: {mend}")
        if foreign := [path.name for what in ("metrics.*", "events.out.tfevents.*") for path in workdir.glob(what)]:
            raise BadInput(
                f"{workdir} has a {foreign[0]} and no config.json, so it is of no run: take another --workdir"
            )
        return
    if saved.get("experiment") != name:
        raise BadInput(f"{workdir} holds a run of {saved.get('experiment')}, not of {name}: take another --workdir")
    config, old = _plain(exp.config), saved["config"]
    differ = [name for name in [*config, *(k for k in old if k not in config)] if config.get(name) != old.get(name)]
    free = FREE | (config.keys() ^ old.keys())  # those that the code has gained or lost since
    if differ and not (allow_changes and free.issuperset(differ)):
        changes = ", ".join(f"{name} was {old.get(name)} and is {config.get(name)}" for name in differ)
        mend = "--allow_changes goes on with it, or " if free.issuperset(differ) else ""
        raise BadInput(f"{workdir} holds a run of another config: {changes}; {mend}take another --workdir")


def refuse_to_lose(workdir: Path) -> None:
    """Raises BadInput where a run ended well and its checkpoints are gone: begun anew, it would lose its log too."""
    status = log.read_status(workdir)
    if status.get("state") in ("done", "preempted") and status.get("step"):
        lost = f"{workdir} holds a run that was saved at step {status['step']}, and its checkpoints are gone"
        raise BadInput(f"{lost}: bring them back, or take another --workdir")


def set_aside(workdir: Path, say: Callable[[str], None]) -> None:
    """The log of a run that has saved and whose checkpoints are gone; one that never came to a save may go."""
    rows = log.read(workdir)
    if rows and log.read_status(workdir).get("step") != 0:
        kept = workdir / f"metrics-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        (workdir / "metrics.jsonl").rename(kept)
        say(f"{workdir} has a log up to step {max(rows):,} and no checkpoint: begun anew, its log kept as {kept.name}")


def running(workdir: Path) -> bool:
    """Whether this process has begun to train there."""
    status = log.read_status(workdir)
    return (status.get("state"), status.get("pid")) == ("running", os.getpid())


def fingerprint(program: Program) -> dict[str, str]:
    """What makes a run besides its config, from the code and the data: another of each gives other words."""
    model = re.sub(r" at 0x[0-9a-f]+|# attributes", "", str(program.exp.model))
    return {
        "data": program.exp.train.identity(),
        "eval": program.exp.eval.identity(),
        "model": " ".join(model.split()),
        "step": hashlib.sha256(program.text().encode()).hexdigest()[:16],
    }


def changed(workdir: Path, program: Program, run: Mapping[str, str]) -> list[str]:
    """What differs from the run that a work directory holds, though its config may not, old and new.

    The step is compared where config, devices and versions are the same: each of them may change its text rightly, and
    `leave_config` says so.
    """
    saved = log.read_config(workdir)
    if saved is None or "fingerprint" not in saved:
        return []
    old = saved["fingerprint"]
    named = [name for name in ("data", "eval", "model") if old.get(name, run[name]) != run[name]]
    found = [f"its {name} was {old[name]} and is {run[name]}" for name in named]
    alike = {"config": _plain(program.exp.config), **_around(program.mesh)}
    if not found and old["step"] != run["step"] and alike == {name: saved.get(name) for name in alike}:
        what = "model, loss, optimizer, augmentation or schedule was changed in the code"
        found.append(f"its step computes otherwise (was {old['step']}, is {run['step']}): {what}")
    return found


def leave_config(
    workdir: Path, exp: Experiment, mesh: jax.sharding.Mesh, run: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """config.json of a new run, or of one that goes on with changes; those of devices and packages are told."""
    saved, config, around = log.read_config(workdir), _plain(exp.config), _around(mesh)
    facts = {"experiment": name_of(exp), **around, "fingerprint": run}
    if saved is not None and saved | {"config": config, **facts} == saved:
        return
    # as durable as the checkpoints, which are nothing without it; `Saver` syncs the folder
    log.write_json(workdir / "config.json", log.describe(config, **facts), sync=True)
    old, new = ({**found, **found.get("versions", {})} for found in (saved or around, around))
    if differ := [f"{k} was {old.get(k)} and is {new[k]}" for k in new if k != "versions" and old.get(k) != new[k]]:
        say(f"{', '.join(differ)}: the bits may differ from here on, and a change of the step's code is not told now")


def _around(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "versions": log.versions(),
    }


def name_of(exp: Experiment) -> str:
    """That of its file."""
    return type(exp.config).__module__.rpartition(".")[2]


def _plain(config: Run) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def is_out_of_memory(error: Exception) -> bool:
    """Where a step was dispatched ahead the runtime keeps the words but not the code."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


@contextlib.contextmanager
def tells_of_memory(exp: Experiment, mesh: jax.sharding.Mesh, of: Literal["train", "eval", "data"]) -> Iterator[None]:
    """The runtime's error that the memory is spent, as OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if of == "data":  # nothing has run
            whole = [source.feed(0) for source in (exp.train, exp.eval) if source.resident]
            spent = WontFit(exp, mesh, sum(x.nbytes for x in jax.tree.leaves(whole)), None, of)
        else:
            spent = OutOfMemory(exp, mesh, None, None, of)
        for note in getattr(error, "__notes__", []):
            spent.add_note(note)
        raise spent from error


def free_memory(mesh: jax.sharding.Mesh, own: int = 0) -> int | None:
    """Bytes of a device that JAX may use, less what others, an earlier run say, hold there; None: the CPU doesn't tell.

    Args:
        own: bytes that may lie there already and are the asker's own.
    """
    stats = mesh.local_devices[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - own)


def begin(
    exp: Experiment,
    workdir: Path | None,
    mesh: jax.sharding.Mesh,
    say: Callable[[str], None],
    at_once: Sequence[int],
    allow_changes: bool,
    instruments: Instruments,
) -> tuple[Program, int, State, Metrics, bool]:
    """All that comes before the first step: compile, restore, compare with the run that is there, announce.

    Returns:
        The program; where to go on, as `restart` tells. Nothing is written until all of it is known to fit.
    """
    home = home_of(workdir)
    with distributed.together():
        program = compile(exp, mesh)
        found = checkpoint.restore_newest(workdir / "checkpoints", program.abstract, say) if workdir else None
        if workdir and found is None:
            refuse_to_lose(workdir)
        run = fingerprint(program) if workdir else {}
        changes = changed(workdir, program, run) if workdir else []
        if changes and not allow_changes:
            mend = "--allow_changes goes on with it, or take another --workdir"
            raise BadInput(f"{workdir} holds a run of the same config, but {'; '.join(changes)}: {mend}")
    at, state, sums, owed = restart(program, workdir, found, say)
    if at < exp.steps and not at_once:
        with distributed.together():
            announce(program, at, instruments, say)
    if home:
        leave_config(home, exp, mesh, run, say)
        if found is None:
            set_aside(home, say)
    return program, at, state, sums, owed


def loop(
    exp: Experiment,
    workdir: Path | None,
    mesh: jax.sharding.Mesh,
    write: Writer | None,
    say: Callable[[str], None],
    signals: list[int],
    stop_after: Callable[[int], bool],
    allow_changes: bool,
    instruments: Instruments,
) -> State:
    """From where the work directory stands to the last step, or to the call after a signal."""
    config, home = exp.config, home_of(workdir)
    at_once = signals if jax.process_count() == 1 else []  # of several processes none may stop without the others
    program, at, state, sums, owed = begin(exp, workdir, mesh, say, at_once, allow_changes, instruments)
    if at >= exp.steps and not owed:
        say(f"already at step {at:,} of {exp.steps:,}: nothing to do")
        return state
    if home:
        log.status(home, "running", step=at, of=exp.steps)
        say(f"after a kill the same command goes on with {shlex.quote(f'--workdir={workdir}')}")
    if at_once:
        raise Preempted(at_once[0], at, saved=at > 0)
    eval_every = eval_period(exp)
    files = log.writer(home, at, say) if home else contextlib.nullcontext(lambda step, values: None)
    rules = (config.keep_last, config.keep_best, exp.best)
    saver = checkpoint.Saver(workdir / "checkpoints", *rules) if workdir else contextlib.nullcontext()
    pending: list[tuple[int, float, Future[tuple[Metrics, Reading]]]] = []  # a log period the device may be working on
    since = at  # where sums begin
    finite = jax.jit(
        lambda params: jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all(),
        out_shardings=jax.sharding.NamedSharding(mesh, sharding.WHOLE),
    )
    clock, ahead = Clock(program, at, instruments), Ahead(most=in_flight(program.mesh))
    spent = log.read_status(home).get("kwh", 0.0) if home else 0.0  # before a kill

    with files as file, saver as saver, ThreadPoolExecutor(1, "metrics") as fetcher, contextlib.closing(program):

        def tell(at: int, values: dict[str, float]) -> None:
            file(at, values)
            if write:
                write(at, values)

        def spoiled(what: str) -> NoReturn:
            if workdir:
                try:
                    with distributed.unhurried():
                        keep_nonfinite(program, state, workdir / "nonfinite")
                except OSError as error:
                    say(str(error))
            raise NonFinite(what)

        def checked(reached: int, sums: Metrics) -> Metrics:
            """A step that was not finite did not advance, so its sums reach less far."""
            if sums["step"].value != reached:
                bad = int(jax.device_get(state.step)) + 1
                spoiled(f"step {bad}: the loss or the gradient is not finite")
            return sums

        def report() -> None:
            """Writes the metrics of the log period before this one: the device has had a period's time for it."""
            while pending:
                due_at, waited, fetching = pending.pop()
                sums, reading = fetching.result()
                values = metrics.compute(checked(due_at, sums))
                scalars = {f"train/{k}": v for k, v in values.items() if isinstance(v, float) and k != "step"}
                tell(due_at, scalars | clock.rates(due_at, reading, waited))

        def settle() -> Metrics:
            """Waits for the last step; the sums of the log period that is under way."""
            report()
            return checked(at if at > since else 0, jax.device_get(sums))

        def save(results: dict[str, float], carried: Metrics, owed: bool = False) -> None:
            """The sums go with the State, so that a run that goes on logs the unbroken run's values."""
            if saver:
                if not finite(state.params):  # loss and gradient were, or the step had not advanced
                    spoiled(f"step {at}: the update is not finite")
                written()  # by all, or the others would take the wait of process 0 for a step that hangs
                by_path = {name: leaf.tolist() for name, leaf in checkpoint.named(carried).items()}
                saver.save(state, results, {"sums": by_path, "owed": owed})
            if home:
                kwh = clock.kwh()
                log.status(home, "running", step=at, of=exp.steps, kwh=None if kwh is None else spent + kwh)
            clock.restart(at)

        def assess(carried: Metrics) -> None:
            """Evaluates and saves. A signal breaks it off: the run that goes on owes it, and begins with it."""
            results = evaluate(program, state, at_once)
            if at_once and not results:
                save({}, carried, owed=True)
                halt()
            scalars = {name: value for name, value in results.items() if isinstance(value, float)}
            if not np.isfinite(list(scalars.values())).all():  # the last step spoiled what it left
                spoiled(f"step {at}: the evaluation is not finite")
            tell(at, {f"eval/{name}": value for name, value in scalars.items()})
            if home:
                log.write_json(home / "evaluation.json", log.evaluation(at, results, exp.classes))
            save(scalars, carried)

        def written() -> None:
            """Waits for the save under way, which process 0 alone writes, however long that takes."""
            if saver:
                with distributed.unhurried(), distributed.together():
                    saver.wait()

        def halt() -> NoReturn:
            written()
            raise Preempted(signals[0], at, saved=bool(saver))

        distributed.moved()  # from here on a step has its limit
        if owed:
            assess(jax.device_get(sums))
        while at < exp.steps:
            before = at
            aligned = at % config.steps_per_call == 0 and at + config.steps_per_call <= exp.steps
            count = config.steps_per_call if aligned else 1
            with clock:
                feed = program.feed(at)
            ahead.hold(state.step)  # here, so that the device works while the feed is made
            state, sums = program.steps(count)(state, sums, feed)
            at += count
            last, stop = at == exp.steps, stop_after(at)

            if due(before, at, config.log_every) or last:
                report()
                pending.append((at, clock.waited(), fetcher.submit(fetch, sums, clock.read)))
                sums, since = program.sums(), at
                if saver:
                    saver.poll()  # a save that failed ends the run here, not at the next save
            elif write:
                write(at, {})
            if due(before, at, eval_every) or last:
                assess(settle())
            elif due(before, at, config.save_every) or stop:
                save({}, settle())
            if stop and not last:
                halt()
        written()
    return state


def keep_nonfinite(program: Program, state: State, folder: Path) -> None:
    """Leaves what replay.py runs again: a State as a checkpoint, and the batch of the step after it.

    It is the last finite State, or, where an evaluation or a save told, the one that it was of.

    Raises:
        OSError: they could not be written.
    """
    feed = program.feed(int(jax.device_get(state.step)))
    whole = jax.sharding.NamedSharding(program.mesh, sharding.WHOLE)
    batch = jax.device_get(jax.jit(program.exp.train.batch, out_shardings=whole)(feed, state.step))
    if home_of(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        np.savez(folder / "batch.npz", **batch)
    with checkpoint.Saver(folder) as saver:
        saver.save(state)


def due(before: int, at: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, at]; never for 0."""
    return every > 0 and at // every > before // every


def restart(
    program: Program, workdir: Path | None, found: tuple[int, State] | None, say: Callable[[str], None]
) -> tuple[int, State, Metrics, bool]:
    """Where to go on: step, State and sums of the checkpoint that was found, or step 0; whether it owes an evaluation.

    Raises:
        BadInput: the processes did not find the same one.
    """
    own = "none" if found is None else f"of step {found[0]}"
    first = distributed.share(own)
    with distributed.together():
        if own != first:
            newest = f"the newest checkpoint in {workdir} is {first} for process 0 and {own} for another"
            raise BadInput(f"{newest}: put the work directory on a file system that all processes share")
    if workdir is None or found is None:
        return 0, program.init(), program.sums(), False
    at, state = found
    say(f"resuming at step {at:,} of {program.exp.steps:,}")
    extra = checkpoint.manifest(workdir / "checkpoints", at)["extra"]
    return at, state, carry(program, extra["sums"], say), extra.get("owed", False)


def carry(program: Program, saved: dict[str, Any] | list[Any], say: Callable[[str], None]) -> Metrics:
    """The sums that were saved by path; empty ones where the step counts something else since, as is then said."""
    empty = program.sums()
    leaves = checkpoint.named(empty)
    if isinstance(saved, list):  # before they had names: in the order of the leaves
        saved = dict(zip(leaves, saved, strict=True)) if len(saved) == len(leaves) else {}
    if {name: np.shape(value) for name, value in saved.items()} != {name: leaf.shape for name, leaf in leaves.items()}:
        say("a step counts other metrics than it did: the log period that was under way has only those of its rest")
        return empty
    values = [np.asarray(saved[name], leaf.dtype) for name, leaf in leaves.items()]
    return sharding.put(program.mesh, sharding.WHOLE, jax.tree.unflatten(jax.tree.structure(empty), values))


def announce(program: Program, at: int, instruments: Instruments, say: Callable[[str], None]) -> None:
    """Before the first step: device, parameters by layer, work, memory, time spent compiling.

    Raises:
        WontFit: the step needs more memory than is free.
    """
    exp, config, mesh = program.exp, program.exp.config, program.mesh
    device = mesh.devices.flat[0]
    say(log.parameter_table(program.abstract.params))
    began = time.perf_counter()
    program.steps(config.steps_per_call)
    if at % config.steps_per_call or exp.steps % config.steps_per_call:
        program.steps(1)  # for what is left over; nothing is compiled under way
    memory, free, evaluation = program.memory(), instruments.free, {}
    need = sum(memory.values())
    if free is None:
        free = free_memory(mesh, own=need - memory.get("activations and temporaries", 0))
    if free is not None:  # else it is compiled when it is needed: nothing would be foreseen by it
        evaluation = program.eval_memory()
    seconds = time.perf_counter() - began
    say(
        f"{mesh.size} x {device.device_kind} | {config.precision} | "
        f"{exp.steps:,} steps of {config.batch_size:,} ({exp.steps * config.batch_size / exp.train.size:,.1f} epochs "
        f"of {exp.train.size:,}) | a step: {log.quantity(program.flops(), 'FLOP')} | compiled in {seconds:.1f} s"
    )
    if memory:
        parts = ", ".join(f"{name} {log.quantity(size, 'B')}" for name, size in memory.items())
        room = "" if free is None else f" of {log.quantity(free, 'B')}"
        beside = f"; an evaluation: {log.quantity(sum(evaluation.values()), 'B')}" if evaluation else ""
        say(f"memory a device: {log.quantity(need, 'B')}{room}: {parts}{beside}")
    resident = program.feed.held(0) + program.eval_feed.held(0)
    if free is not None and resident > free:
        raise WontFit(exp, mesh, resident, free, "data")
    if free is not None and need > free:
        raise WontFit(exp, mesh, need, free)
    if free is not None and sum(evaluation.values()) > free:
        raise WontFit(exp, mesh, sum(evaluation.values()), free, "eval")


def in_flight(mesh: jax.sharding.Mesh) -> int | None:
    """Calls that may be dispatched before the first is done; None: any number."""
    return CPU_AHEAD if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else None


class Ahead:
    """Bounds by time what is dispatched ahead of the device, so that a signal is soon obeyed; and by number, `most`.

    To wait for it once a second costs a moment's idleness. The buffers of earlier calls are donated, so there is none
    to wait for but the newest.
    """

    def __init__(self, seconds: float = 1.0, most: int | None = None):
        self.seconds, self.most = seconds, most
        self.calls, self.quota, self.since = 0, 1, time.perf_counter()

    def hold(self, newest: Any) -> None:
        """Before a call; waits for the call before, `newest`, once in so many calls as lately took `seconds`."""
        if self.calls >= self.quota:
            jax.block_until_ready(newest)
            now = time.perf_counter()
            quota = max(1, int(self.calls * self.seconds / (now - self.since)))
            self.quota = min(quota, self.most or quota)
            self.calls, self.since = 0, now
        self.calls += 1


class Reading(NamedTuple):
    """Of the clocks, at the moment when the device was done with some step."""

    seconds: float
    joules: float | None


def fetch(sums: Metrics, read: Callable[[], Reading]) -> tuple[Metrics, Reading]:
    """On a thread of its own: the sums, and the clocks when the device was done with them."""
    return jax.device_get(sums), read()


class Clock:
    """Rates since the last reading; time spent in evaluations and saves is left out by `restart`."""

    def __init__(self, program: Program, at: int, instruments: Instruments):
        self.mesh, config = program.mesh, program.exp.config
        self.batch_size = config.batch_size
        self.meter = instruments.joules
        self.hosts = self.mesh.size / len(self.mesh.local_devices)  # the meter is of this one, and taken for all alike
        self.peak = instruments.peak(self.mesh.devices.flat[0].device_kind, config.precision)
        self.flops = program.flops() if self.peak else 0.0  # of a step
        self.restart(at)
        self.began = self.since

    def read(self) -> Reading:
        return Reading(time.perf_counter(), self.meter())

    def restart(self, at: int) -> None:
        self.at, self.since, self.wait = at, self.read(), 0.0

    def kwh(self) -> float | None:
        """Used since the first step of this process, evaluations and saves with it."""
        now = self.meter()
        return None if now is None or self.began.joules is None else (now - self.began.joules) * self.hosts / 3.6e6

    def __enter__(self) -> None:
        """Around what waits for data."""
        self.wait -= time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.wait += time.perf_counter()

    def waited(self) -> float:
        """Seconds since this was last asked."""
        seconds, self.wait = self.wait, 0.0
        return seconds

    def rates(self, at: int, now: Reading, waited: float) -> dict[str, float]:
        """The perf/ and mem/ values of the steps up to `at`, which were done `now` and waited for data so long."""
        seconds, steps, before = now.seconds - self.since.seconds, at - self.at, self.since.joules
        self.at, self.since = at, now
        rate = steps * self.batch_size / seconds
        values = {
            "perf/examples_per_sec": rate,
            "perf/examples_per_sec_per_device": rate / self.mesh.size,
            "perf/step_ms": 1e3 * seconds / steps,
            "perf/data_wait_frac": waited / seconds,
        }
        if self.peak:
            values["perf/mfu"] = self.flops * steps / seconds / (self.peak * self.mesh.size)
        if now.joules is not None and before is not None:
            values["perf/joules_per_example"] = (now.joules - before) * self.hosts / (steps * self.batch_size)
        stats = self.mesh.local_devices[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:  # the CPU does not tell
            values["mem/peak_bytes"] = float(stats["peak_bytes_in_use"])
        return values


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the signals of `stops` are put into; the loop looks at it, for nothing is safe inside a handler.

    Those that follow change nothing: what the first began, a save, is done within seconds. One that comes while XLA
    compiles is seen when that is done; nothing is lost by a SIGKILL there.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(signum: int, frame: Any) -> None:
        seen.append(signum)

    with stops.handled(note):
        yield seen


def evaluate_checkpoint(exp: Experiment, workdir: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluate the best checkpoint of a work directory, or the newest where none is ranked; damaged ones are named.

    Where code or data are no longer those of the run, `say` is told what differs.

    Returns:
        What evaluation.json then holds; where it cannot be written, `say` is told.

    Raises:
        BadInput: there is none, or it is not of this experiment and config; or its evaluation does not fit the memory.
    """
    directory = workdir / "checkpoints"
    with distributed.together():
        mesh = sharding.make_mesh(exp.config)
        program = compile(resolve(exp, mesh), mesh)
        found = checkpoint.restore_best(directory, program.abstract, exp.best, say)
        if found is None:
            raise BadInput(f"no checkpoint in {directory}: train first, or give the --workdir of a run that was saved")
        changes = changed(workdir, program, fingerprint(program))
    if changes:
        say(f"{workdir} holds a run of the same config, but {'; '.join(changes)}: what follows is of what there is now")
    at, state = found
    say(f"evaluating step {at:,} of {workdir} on {exp.eval.size:,} examples")
    try:
        with contextlib.closing(program):
            results = log.evaluation(at, evaluate(program, state), exp.classes)
    except OutOfMemory as error:
        raise BadInput(line_of(error)) from None
    if home := home_of(workdir):
        try:
            log.write_json(home / "evaluation.json", results)
        except OSError as error:  # another's run, which one may read
            say(f"{error}: what follows is not left there")
    return results

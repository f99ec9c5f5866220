"""Where does a step's time go? A trace of a few steps for TensorBoard's profiler, and what it says in figures.

The trace names instructions of the compiled program; the program's text (hlo.py) says what each is and which layer
asked for it. The device is idle where none of them runs, and what the host did meanwhile is in the trace as well.
"""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcompute import log, sharding, train
from jaxcompute.compute import hlo
from jaxcompute.core import Experiment

FEED, DISPATCH, WAIT = HOST = ("host: feed", "host: dispatch", "host: wait")  # what the host does, as the trace has it
MEANS = {FEED: "made a batch", DISPATCH: "started a call", WAIT: "waited for the device", "": "did something else"}


class Event(NamedTuple):
    """Something that ran, in nanoseconds of the trace's clock."""

    name: str  # of the instruction, where `instruction`; else of a library's kernel or of the host's doing
    start: float
    end: float
    line: str = ""  # the thread or stream; what runs inside another lies on its line
    instruction: bool = True


class Op(NamedTuple):
    """An instruction's runs in a step, on one device."""

    name: str
    kind: str  # of hlo.KINDS
    place: str  # layer and pass
    runs: float
    ms: float
    flops: float
    bytes: float


class Profile(NamedTuple):
    """Of one step; times are means over devices."""

    experiment: str
    device: str
    devices: int
    precision: str
    steps: int  # traced
    ms: float  # without the trace
    traced_ms: float
    idle: float  # share of the traced time in which a device runs nothing
    gaps: dict[str, float]  # ms a step that a device is idle, by what the host does meanwhile
    longest_gap_ms: float
    ops: list[Op]  # from the longest time to the shortest
    flops: float  # of the model's products, on one device
    trace: str  # folder of it, below the work directory


# -- the trace ---------------------------------------------------------------------------------------------------------


def run(exp: Experiment, workdir: Path, seconds: float = 2.0) -> Profile:
    """Trace the experiment's step for about so many seconds, 4 calls at least and 50 at most.

    Leaves the trace in workdir/plugins/profile/, where `tensorboard --logdir=workdir` finds it.
    """
    # what is named in the program is not in its key, and a cached one may have the names of an older source
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    with contextlib.closing(program):
        return traced(program, workdir, seconds)


def traced(program: train.Program, workdir: Path, seconds: float) -> Profile:
    """As `run`, of a compiled program."""
    count, mesh = program.exp.config.steps_per_call, program.mesh
    call = program.steps(count)
    state, sums, at = program.init(), program.sums(), 0

    def loop(calls: int) -> float:
        """Seconds a step."""
        nonlocal state, sums, at
        began = time.perf_counter()
        for _ in range(calls):
            with jax.profiler.StepTraceAnnotation("train", step_num=at):
                with jax.profiler.TraceAnnotation(FEED):
                    feed = program.feed(at)
                with jax.profiler.TraceAnnotation(DISPATCH):
                    state, sums = call(state, sums, feed)
            at += count
        with jax.profiler.TraceAnnotation(WAIT):
            jax.block_until_ready(state.params)
        return (time.perf_counter() - began) / calls / count

    loop(2)
    calls = max(4, min(train.in_flight(mesh) or 50, round(seconds / loop(1) / count)))
    plain = min(loop(calls) for _ in range(3))  # what else the machine does can only slow it
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # else each Python call costs, and the device waits for it
    folder = workdir / "plugins" / "profile"
    before = set(folder.glob("*/*.xplane.pb"))
    with jax.profiler.trace(str(workdir), profiler_options=options):
        slowed = loop(calls)
    (file,) = set(folder.glob("*/*.xplane.pb")) - before
    devices, host = read(file)
    return summary(
        devices,
        host,
        hlo.read(program.compiled(count).as_text() or ""),
        calls * count,
        experiment=train.name_of(program.exp),
        device=mesh.devices.flat[0].device_kind,
        precision=program.exp.config.precision,
        ms=1e3 * plain,
        traced_ms=1e3 * slowed,
        flops=program.flops() / mesh.size,
        trace=str(file.parent.relative_to(workdir)),
    )


def read(file: Path) -> tuple[dict[str, list[Event]], list[Event]]:
    """Of a trace that JAX wrote (*.xplane.pb): what ran, by device, and what the host did.

    A GPU's streams are planes of its own. The CPU's instructions run on the host's threads, and are told from all else
    there by the instruction that they name; virtual devices by their number.
    """
    devices: dict[str, list[Event]] = defaultdict(list)
    host: list[Event] = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            if device and not str(line.name).startswith("Stream"):
                continue  # what the profiler derived from the streams
            for event in line.events:
                if event.name in HOST:
                    host.append(Event(event.name, event.start_ns, event.end_ns))
                    continue
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and not device:
                    continue
                key = plane.name if device else f"CPU {stats.get('device_ordinal', 0)}"
                found = Event(str(name or event.name), event.start_ns, event.end_ns, str(line.name), name is not None)
                if name and device:
                    found = found._replace(name=_kernel(str(name), event.name))
                devices[key].append(found)
    return dict(devices), host


def _kernel(instruction: str, kernel: str) -> str:
    """A captured graph of kernels is one instruction, which says less than the kernel's own name."""
    return kernel if instruction.startswith("command_buffer") else instruction


# -- what it says: pure ------------------------------------------------------------------------------------------------


def summary(
    devices: Mapping[str, Sequence[Event]],
    host: Sequence[Event],
    instructions: Mapping[str, hlo.Instruction],
    steps: int,
    **facts: Any,
) -> Profile:
    """What the events of so many steps say, by the program's instructions."""
    times, counts, gaps = (defaultdict[str, float](float) for _ in range(3))
    idle, longest = [], 0.0
    for events in devices.values():
        for event, own in alone(events):
            times[event.name] += own
            counts[event.name] += 1
        holes = list(between(events))
        longest = max([longest, *(end - start for start, end in holes)])
        idle.append(sum(end - start for start, end in holes) / _length(events))
        for doing, length in blamed(holes, host).items():
            gaps[doing] += length
    each = 1 / (len(devices) * steps) if devices else 0.0
    kernels = {name.replace(".", "_").replace("-", "_"): name for name in instructions}
    ops = []
    for name, own in ranked(times):
        found = instructions.get(name) or instructions.get(kernels.get(name, ""))
        found = found or hlo.Instruction(name, hlo.library_kind(name), "", False, 0.0, 0.0)
        runs = counts[name] * each
        ops.append(Op(name, found.kind, found.place, runs, own * each / 1e6, found.flops * runs, found.bytes * runs))
    return Profile(
        devices=len(devices),
        steps=steps,
        idle=statistics.mean(idle) if idle else 0.0,
        gaps={doing: total * each / 1e6 for doing, total in ranked(gaps)},
        longest_gap_ms=longest / 1e6,
        ops=ops,
        **facts,
    )


def alone(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each event with its own time: what runs inside it on its line, as the body of a loop, is taken off."""
    own: list[tuple[Event, float]] = []
    open_: dict[str, list[int]] = defaultdict(list)  # by line: events that contain the next
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        around = open_[event.line]
        while around and own[around[-1]][0].end < event.end:
            around.pop()
        if around:
            outer, left = own[around[-1]]
            own[around[-1]] = outer, left - (event.end - event.start)
        around.append(len(own))
        own.append((event, event.end - event.start))
    return own


def between(events: Iterable[Event]) -> Iterable[tuple[float, float]]:
    """The intervals between the first start and the last end in which nothing runs."""
    reached: float | None = None
    for event in sorted(events, key=lambda event: event.start):
        if reached is not None and event.start > reached:
            yield reached, event.start
        reached = event.end if reached is None else max(reached, event.end)


def _length(events: Sequence[Event]) -> float:
    return max(event.end for event in events) - min(event.start for event in events)


def blamed(holes: Sequence[tuple[float, float]], host: Sequence[Event]) -> dict[str, float]:
    """The holes' total length by what the host did in it; "" for what the trace doesn't say."""
    found: dict[str, float] = defaultdict(float)
    doings = sorted(host, key=lambda doing: doing.start)
    for start, end in holes:
        rest = end - start
        for doing in doings:
            if doing.start >= end:
                break
            shared = min(end, doing.end) - max(start, doing.start)
            if shared > 0:
                found[doing.name] += shared
                rest -= shared
        if rest > 0:
            found[""] += rest
    return dict(found)


def by(profile: Profile, what: str) -> list[tuple[str, float]]:
    """(kind or place, ms a step), from the longest."""
    found: dict[str, float] = defaultdict(float)
    for op in profile.ops:
        found[getattr(op, what)] += op.ms
    return ranked(found)


def ranked(figures: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(figures.items(), key=lambda pair: -pair[1])


# -- showing -----------------------------------------------------------------------------------------------------------


def text(profile: Profile, most: int = 12) -> str:
    """Time by kind of operation and by layer, the longest instructions, and where the device was idle."""
    total = sum(op.ms for op in profile.ops) or 1.0

    def rows(pairs: Sequence[tuple[str, float]]) -> list[tuple[str, str, str]]:
        shown = [(name, f"{ms:.3g}", f"{ms / total:.1%}") for name, ms in pairs[:most]]
        rest, more = sum(ms for _, ms in pairs[most:]), len(pairs) - most
        return shown + ([(f"{more} more", f"{rest:.3g}", f"{rest / total:.1%}")] if rest else [])

    top = [
        (op.name, op.kind, op.place, f"{op.runs:.3g}", f"{op.ms:.3g}", f"{op.ms / total:.1%}")
        for op in profile.ops[:most]
    ]
    slower = profile.traced_ms / profile.ms - 1
    lines = [
        f"{profile.experiment} on {profile.devices} x {profile.device}, {profile.precision}: "
        f"{profile.ms:.3g} ms a step; {profile.steps} steps traced, each {abs(slower):.0%} "
        f"{'slower' if slower >= 0 else 'faster'} for it",
        "",
        log.table(rows(by(profile, "kind")), ("kind of operation", "ms a step", "share"), 1),
        "",
        log.table(rows(by(profile, "place")), ("layer", "ms a step", "share"), 1),
        "",
        log.table(top, ("instruction", "kind", "layer", "runs", "ms a step", "share"), 3),
        "",
        idle_text(profile),
    ]
    return "\n".join(lines)


def idle_text(profile: Profile) -> str:
    """How long the device was idle, and what the host did meanwhile."""
    total = sum(profile.gaps.values())
    if not total:
        return "the device was never idle"
    parts = ", ".join(f"{MEANS[doing]} {ms / total:.0%}" for doing, ms in profile.gaps.items() if ms / total >= 0.005)
    return (
        f"idle {profile.idle:.1%} of the time, {total:.3g} ms a step, the longest gap {profile.longest_gap_ms:.3g} ms; "
        f"meanwhile the host: {parts}"
    )


def to_json(profile: Profile) -> dict[str, Any]:
    return profile._asdict() | {
        "gaps": {MEANS[doing]: ms for doing, ms in profile.gaps.items()},
        "ops": [op._asdict() for op in profile.ops],
    }

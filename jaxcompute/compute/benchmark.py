"""What did jit, precision, batch size and devices give? The experiment's own step, measured one change at a time.

    ladder    serial (float32, one device, each operation by itself), then jit, tensor cores, bfloat16, all devices
    batch     the step at other batch sizes, on one device, to the largest that fits
    strong    the same batch on more devices      T_1 / T_n is the speed-up, and that over n the efficiency
    weak      a batch that grows with the devices T_1 / T_n is the efficiency

Virtual CPU devices share the same cores: their scaling shows the cost of splitting, not a gain.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompute import log, sharding, step, train
from jaxcompute.compute import ceilings, energy, hlo, memory, peaks, profile
from jaxcompute.core import Experiment
from jaxcompute.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = "measured here"
Precision = Literal["float32", "tensorfloat32", "bfloat16"]


class Setting(NamedTuple):
    """How a step is run."""

    precision: Precision
    batch_size: int  # over all devices
    devices: int = 1
    steps_per_call: int = 1
    jit: bool = True


class Point(NamedTuple):
    """A setting and what it gave. Shares are of what all its devices can do at most."""

    setting: Setting
    ms: float  # a step, median
    spread: float  # half the distance between the quartiles, as a share of the median
    examples_per_sec: float
    mfu: float | None  # FLOPs of the model's matrix products and convolutions, of the peak
    bandwidth: float | None  # bytes that XLA says the step moves, of the memory's bandwidth
    predicted: int | None  # bytes a device
    measured: int | None  # bytes a device, where they are the most so far
    data: float | None  # of the step's time: reading, gathering and augmenting its batch
    collectives: float | None  # of the step's time: sending between devices, and waiting for one another; one: None
    joules: float | None  # an example


class Roofs(NamedTuple):
    """Of one device; from the table of chips, else measured."""

    flops: dict[str, float]  # by precision
    bandwidth: float
    source: str


class Benchmark(NamedTuple):
    experiment: str
    device: str
    devices: int
    roofs: Roofs
    ladder: list[Point]
    batches: list[Point]
    strong: list[Point]
    weak: list[Point]
    serial_share: float | None  # of the step, by Amdahl's law fitted to `strong`; None: one device


# -- what to measure ---------------------------------------------------------------------------------------------------


def precisions(platform: str, kind: str) -> tuple[Precision, ...]:
    """From the slowest to the fastest that the device has, so far as it is known."""
    if platform != "gpu":
        return ("float32", "bfloat16")
    chip = peaks.chip(kind)
    return ("float32", "tensorfloat32", "bfloat16") if chip is None or chip.tensorfloat32 else ("float32", "bfloat16")


def counts(devices: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({2**i for i in range(devices.bit_length()) if 2**i <= devices} | {devices})


def placed(exp: Experiment, setting: Setting) -> Experiment:
    """The experiment with this setting in its config."""
    config = dataclasses.replace(
        exp.config,
        precision="bfloat16" if setting.precision == "bfloat16" else "float32",
        mesh_data=setting.devices,
        mesh_fsdp=1,
        mesh_model=1,
        steps_per_call=setting.steps_per_call,
    )
    steps = min(exp.steps, 2**32 // setting.batch_size)  # as many as `train.resolve` lets a run have
    exp = dataclasses.replace(exp, config=config, steps=steps)
    return memory.with_batch(exp, setting.batch_size, exp.config.accumulate)


# -- measuring ---------------------------------------------------------------------------------------------------------


def arithmetic(precision: Precision) -> contextlib.AbstractContextManager[None]:
    """XLA takes TF32 for float32 unless told otherwise."""
    exact = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": None}[precision]
    return jax.default_matmul_precision(exact) if exact else contextlib.nullcontext()


def measure(exp: Experiment, setting: Setting, roofs: Roofs, seconds: float = 1.0) -> Point:
    """Run the step under a setting for about so many seconds after a warm-up."""
    with arithmetic(setting.precision), contextlib.ExitStack() as held:
        exp = placed(exp, setting)
        mesh = sharding.make_mesh(exp.config)
        program = held.enter_context(contextlib.closing(train.compile(train.resolve(exp, mesh), mesh)))
        exp = program.exp
        if not setting.jit:
            return _serial(program, setting, roofs, seconds)
        joules = held.enter_context(energy.meter(mesh.local_devices))
        before = _peak(mesh)
        count = setting.steps_per_call
        call = program.steps(count)
        state, sums, at = program.init(), program.sums(), 0

        def run(calls: int) -> tuple[float, float]:
            """Seconds a step, and the part of them that the host made batches."""
            nonlocal state, sums, at
            waited, began = 0.0, time.perf_counter()
            for _ in range(calls):
                started = time.perf_counter()
                feed = program.feed(at)
                waited += time.perf_counter() - started
                state, sums = call(state, sums, feed)
                at += count
            jax.block_until_ready(state.params)
            return (time.perf_counter() - began) / calls / count, waited / calls / count

        run(2)
        calls = max(1, min(round(seconds / 20 / run(1)[0] / count), train.in_flight(mesh) or 1000))
        start, steps, readings = joules(), at, []
        end = time.perf_counter() + seconds
        while len(readings) < 5 or time.perf_counter() < end:
            readings.append(run(calls))
        used = joules()
        steps = at - steps
        times = [reading[0] for reading in readings]
        second = statistics.median(times)
        waited = statistics.median(reading[1] for reading in readings)
        prepare = jax.jit(lambda feed, at: exp.prepare(exp.train.batch(feed, at), jax.random.key(0), True))
        feed = program.feed(0)
        preparing = _median(lambda: prepare(feed, jnp.int32(0)), seconds / 4)
        after = _peak(mesh)
        moved = _cost(program.compiled(count), "bytes accessed")  # a loop's body counts once
        return Point(
            setting,
            ms=1e3 * second,
            spread=_spread(times),
            examples_per_sec=setting.batch_size / second,
            mfu=program.flops() / second / (roofs.flops[setting.precision] * mesh.size),
            bandwidth=moved and moved / second / roofs.bandwidth,
            predicted=sum(program.memory().values()) or None,
            measured=after if after is not None and after > (before or 0) else None,
            data=min(1.0, (waited + preparing) / second),
            collectives=_collectives(program) if mesh.size > 1 else None,
            joules=None if start is None or used is None else (used - start) / steps / setting.batch_size,
        )


def _serial(program: train.Program, setting: Setting, roofs: Roofs, seconds: float) -> Point:
    """The pure step without jit: one operation after the other, each called from Python."""
    exp = program.exp
    train_step = exp.train_step or step.train_step
    feed, state = program.feed(0), program.init()

    def once() -> Any:
        nonlocal state
        state, _ = train_step(exp, state, exp.train.batch(feed, state.step))
        return state.params

    with jax.disable_jit():
        times = _times(once, seconds)
    second = statistics.median(times)
    mfu = program.flops() / second / roofs.flops[setting.precision]
    rate = setting.batch_size / second
    return Point(setting, 1e3 * second, _spread(times), rate, mfu, None, None, None, None, None, None)


def _collectives(program: train.Program) -> float:
    """Their share of a step, from a trace of a few."""
    with tempfile.TemporaryDirectory() as folder:
        found = profile.traced(program, Path(folder), seconds=0.2)
    spent = sum(op.ms for op in found.ops if op.kind == hlo.COLLECTIVE)
    return min(1.0, spent / found.traced_ms)


def _times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Of single calls, at least three after a warm-up."""
    jax.block_until_ready(call())
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times


def _median(call: Callable[[], Any], seconds: float) -> float:
    return statistics.median(_times(call, seconds))


def _spread(times: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def _peak(mesh: jax.sharding.Mesh) -> int | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use")


def _cost(call: jax.stages.Compiled, name: str) -> float | None:
    """Of one device, as XLA counts it."""
    found = call.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    return (found or {}).get(name)


def roofs(seconds: float = 2.0) -> Roofs:
    """Of the first device: its datasheet's, else as measured."""
    device = jax.devices()[0]
    chip = peaks.chip(device.device_kind)
    if chip:
        flops = {
            "float32": chip.float32,
            "tensorfloat32": chip.tensorfloat32,
            "bfloat16": chip.bfloat16 or chip.float32,
        }
        return Roofs({name: rate for name, rate in flops.items() if rate}, chip.bandwidth, chip.source)
    kinds = precisions(device.platform, device.device_kind)
    measured = {kind: ceilings.matmul(device, kind, seconds / 4) for kind in kinds}
    return Roofs(measured, ceilings.copy(device, seconds / 4), MEASURED)


def higher(one: Roofs, other: Roofs) -> Roofs:
    """Of two measurements the better: what else the machine does can lower a ceiling, and nothing raises one."""
    flops = {name: max(rate, other.flops[name]) for name, rate in one.flops.items()}
    return Roofs(flops, max(one.bandwidth, other.bandwidth), one.source)


def below(point: Point, before: Roofs, roofs: Roofs) -> Point:
    """The point with its shares of other roofs."""
    kind = point.setting.precision
    mfu, bandwidth = point.mfu, point.bandwidth
    return point._replace(
        mfu=None if mfu is None else mfu * before.flops[kind] / roofs.flops[kind],
        bandwidth=None if bandwidth is None else bandwidth * before.bandwidth / roofs.bandwidth,
    )


def run(exp: Experiment, say: Callable[[str], None], seconds: float = 1.0) -> Benchmark:
    """Measure it all. Batches double to the largest that fits on a GPU; on the CPU they are a quarter to four times.

    A setting that does not fit the memory is left out, and told.

    Raises:
        BadInput: the experiment's batch does not fit one device in the fastest precision, which all else stands beside.
    """
    devices = jax.devices()
    device, total, batch = devices[0], len(devices), exp.config.batch_size
    top = roofs()
    kinds: list[Precision] = [kind for kind in precisions(device.platform, device.device_kind) if kind in top.flops]
    if train.broken_bfloat16(device.platform):
        kinds.remove("bfloat16")
    fastest: Precision = kinds[-1] if device.platform == "gpu" else "float32"
    done: dict[Setting, Point | None] = {}

    def point(setting: Setting) -> Point | None:
        if setting not in done:
            try:
                found = measure(exp, setting, top, seconds)
            except jax.errors.JaxRuntimeError as error:
                if not train.is_out_of_memory(error):
                    raise
                found = None
            done[setting] = found
            gave = f"{found.examples_per_sec:,.0f} examples/s" if found else "does not fit the memory, and is left out"
            say(f"{describe(setting)}: {gave}")
        return done[setting]

    def points(settings: Iterable[Setting]) -> list[Point]:
        return [found for setting in settings if (found := point(setting))]

    even = total * exp.config.accumulate  # what a batch must be a multiple of on all devices
    ladder = [Setting("float32", batch, jit=False), *(Setting(kind, batch) for kind in kinds)]
    if device.platform == "gpu" and exp.train.resident:
        ladder.append(Setting(fastest, batch, steps_per_call=8))
    if total > 1 and batch % even == 0:
        ladder.append(Setting(fastest, batch, total))
    batches = []
    free = train.free_memory(sharding.make_mesh(placed(exp, Setting(fastest, batch)).config))
    sizes = [max(1, batch // 4), batch, 4 * batch] if free is None else [batch * 2**i // 4 for i in range(12)]
    unit = exp.config.accumulate
    most = exp.train.size // unit * unit
    for size in dict.fromkeys(max(unit, min(size // unit * unit, most)) for size in sizes):
        found = point(Setting(fastest, size))
        if not found:
            break
        batches.append(found)
        if free and (found.predicted or 0) * 2 > free:
            break
    if not point(Setting(fastest, batch)):
        raise BadInput(f"--config.batch_size={batch} does not fit one device: take a smaller one")
    ladder = points(ladder)
    strong, weak = [], []
    if total > 1:
        several = [n for n in counts(total) if batch % (n * exp.config.accumulate) == 0]
        strong = points(Setting(fastest, batch, n) for n in several)
        weak = points(Setting(fastest, batch * n, n) for n in counts(total))
    found = Benchmark(
        experiment=train.name_of(exp),
        device=device.device_kind,
        devices=total,
        roofs=higher(top, roofs()) if top.source == MEASURED else top,
        ladder=ladder,
        batches=batches,
        strong=strong,
        weak=weak,
        serial_share=amdahl(strong),
    )
    parts = ("ladder", "batches", "strong", "weak")
    return found._replace(
        **{part: [below(point, top, found.roofs) for point in getattr(found, part)] for part in parts}
    )


def amdahl(strong: Sequence[Point]) -> float | None:
    """The serial share s of T_n = T_1 (s + (1 - s) / n) that fits best (Amdahl 1967); None for one device count."""
    if len(strong) < 2:
        return None
    first = strong[0].ms
    pairs = [(1 - 1 / p.setting.devices, p.ms / first - 1 / p.setting.devices) for p in strong]
    share = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    return min(1.0, max(0.0, share))


# -- showing -----------------------------------------------------------------------------------------------------------


def describe(setting: Setting) -> str:
    parts = [
        setting.precision if setting.jit else f"serial, {setting.precision}",
        f"batch {setting.batch_size:,}",
        f"{setting.devices} devices" if setting.devices > 1 else "",
        f"{setting.steps_per_call} steps a call" if setting.steps_per_call > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def text(found: Benchmark) -> str:
    """Three tables, and what they say in words."""
    serial = next((point for point in found.ladder if not point.setting.jit), None)  # None: it did not fit
    headers = ["setting", "examples/s", "ms", "±", "over serial", "of peak", "of bandwidth"]
    headers += ["predicted", "measured", "data", "collectives", "J/example"]
    rows = [
        (
            describe(point.setting),
            f"{point.examples_per_sec:,.0f}",
            f"{point.ms:.3g}",
            f"{point.spread:.0%}",
            _times_as_fast(point.examples_per_sec / serial.examples_per_sec) if serial else "",
            _share(point.mfu),
            _share(point.bandwidth),
            _bytes(point.predicted),
            _bytes(point.measured),
            _share(point.data),
            _share(point.collectives),
            "" if point.joules is None else f"{point.joules:.3g}",
        )
        for point in dict.fromkeys([*found.ladder, *found.batches])
    ]
    kept = [i for i in range(len(headers)) if any(row[i] for row in rows)]  # a column that no one can fill is left out
    lines = [log.table([[row[i] for i in kept] for row in rows], [headers[i] for i in kept], 1)]
    if found.devices > 1:
        lines += ["", _scaling(found)]
    else:
        lines += ["", f"one device only ({found.device}): nothing is said of scaling over devices"]
    lines.append(f"peaks a device, {found.roofs.source}: " + _roof(found.roofs))
    return "\n".join(lines)


def _scaling(found: Benchmark) -> str:
    rows = []
    for n in sorted({point.setting.devices for point in (*found.strong, *found.weak)}):
        row: list[Any] = [n]
        for points in (found.strong, found.weak):
            point = next((p for p in points if p.setting.devices == n), None)
            if point is None:
                row += ["", "", ""]
            else:
                gain = point.examples_per_sec / points[0].examples_per_sec
                row += [f"{point.ms:.3g}", f"{gain:.2f}x", f"{gain / n:.0%}"]
        rows.append(row)
    headers = ["devices", "strong: ms", "speed-up", "efficiency", "weak: ms", "speed-up", "efficiency"]
    lines = [log.table(rows, headers, 0)]
    if found.serial_share is not None:
        limit = (
            f"at most {1 / found.serial_share:.1f}x on any number" if found.serial_share > 0 else "no limit in sight"
        )
        lines.append(f"Amdahl's law fits a serial share of {found.serial_share:.1%}: {limit}")
    if found.device == "cpu":
        lines.append("virtual devices share this machine's cores: more of them can't be faster")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    """Two digits: 41%, 4.1%, 0.041%."""
    return "" if value is None else f"{float(f'{100 * value:.2g}'):g}%"


def _times_as_fast(gain: float) -> str:
    return f"{gain:,.0f}x" if gain >= 10 else f"{gain:.1f}x"


def _bytes(value: int | None) -> str:
    return "" if value is None else log.quantity(value, "B")


def _roof(roofs: Roofs) -> str:
    rates = [f"{name} {log.quantity(rate, 'FLOP/s')}" for name, rate in roofs.flops.items()]
    return ", ".join([*rates, f"memory {log.quantity(roofs.bandwidth, 'B/s')}"])


def to_json(found: Benchmark) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(item) for name, item in value._asdict().items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(found)


def picture(found: Benchmark) -> "Figure":
    """One picture: what each change gave, throughput by batch size, and devices (or memory, where there is one).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    gains, batches, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    best = max((*found.ladder, *found.batches, *found.strong, *found.weak), key=lambda p: p.examples_per_sec)
    peak = "" if best.mfu is None else f", {best.mfu:.0%} of peak"
    figure.suptitle(
        f"{found.experiment} on {found.devices} x {found.device}: {best.examples_per_sec:,.0f} examples/s{peak}",
        fontsize=13,
    )
    _draw_gains(gains, found)
    _draw_batches(batches, found.batches)
    if found.devices > 1:
        _draw_scaling(right, found)
    else:
        _draw_memory(right, found.batches)
    for axes in (gains, batches, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


BLUE, GREY, ORANGE = "#2f6db3", "#9aa3ad", "#d9822b"


def _draw_gains(axes: Any, found: Benchmark) -> None:
    points, slowest = found.ladder, found.ladder[0].examples_per_sec
    first = points[0].setting
    name = first.precision if first.jit else "serial"  # which may not have fit
    names = [name if first.jit else "serial\n(no jit, 1 device)"]
    for before, point in itertools.pairwise(points):
        a, b = before.setting, point.setting
        change = [
            "jit" if b.jit and not a.jit else "",
            b.precision if b.precision != a.precision else "",
            f"{b.devices} devices" if b.devices != a.devices else "",
            f"{b.steps_per_call} steps a call" if b.steps_per_call > 1 else "",
        ]
        names.append(" ".join(filter(None, change)))
    places = range(len(points))
    best = max(range(len(points)), key=lambda i: points[i].examples_per_sec)
    colors = [GREY if i == 0 else ORANGE if i == best else BLUE for i in places]
    axes.barh(places, [p.examples_per_sec / slowest for p in points], color=colors)
    for place, point in zip(places, points, strict=True):
        gain = point.examples_per_sec / slowest
        axes.text(gain, place, f" {_times_as_fast(gain)}  {point.examples_per_sec:,.0f}/s", va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(p.examples_per_sec / slowest for p in points))
    axes.set_title(f"What each gave, batch {points[0].setting.batch_size:,}", fontsize=11)
    axes.set_xlabel(f"times as fast as {name}")


def _draw_batches(axes: Any, points: Sequence[Point]) -> None:
    sizes = [p.setting.batch_size for p in points]
    axes.plot(sizes, [p.examples_per_sec for p in points], "o-", color=BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1.2 * max(p.examples_per_sec for p in points))
    for p in points:
        if p.mfu is not None:
            place = (p.setting.batch_size, p.examples_per_sec)
            label = _share(p.mfu) + " of peak"
            style = {"ha": "center", "fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
            axes.annotate(label, place, (0, 9), textcoords="offset points", **style)
    axes.set_title(f"Batch size, {points[0].setting.precision}, one device", fontsize=11)
    axes.set_xlabel("examples a step")
    axes.yaxis.set_major_formatter(lambda value, _: log.quantity(value, ""))
    axes.set_ylabel("examples/s")
    axes.margins(x=0.25)


def _draw_scaling(axes: Any, found: Benchmark) -> None:
    ns = [p.setting.devices for p in found.weak]
    axes.plot(ns, ns, "--", color=GREY, label="ideal")
    for points, color, name in ((found.weak, ORANGE, "weak: batch grows"), (found.strong, BLUE, "strong: same batch")):
        gains = [p.examples_per_sec / points[0].examples_per_sec for p in points]
        axes.plot([p.setting.devices for p in points], gains, "o-", color=color, label=name)
    if found.serial_share is not None:
        s = found.serial_share
        axes.plot(ns, [1 / (s + (1 - s) / n) for n in ns], ":", color=BLUE, label=f"Amdahl, serial share {s:.1%}")
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.set_ylim(0)
    axes.set_title("Devices" + (" (virtual: they share the cores)" if found.device == "cpu" else ""), fontsize=11)
    axes.set_xlabel("devices")
    axes.set_ylabel("times as fast as one")
    axes.legend(frameon=False, fontsize=8)


def _draw_memory(axes: Any, points: Sequence[Point]) -> None:
    sizes = [p.setting.batch_size for p in points]
    axes.plot(sizes, [(p.predicted or 0) / 1e6 for p in points], "o-", color=BLUE, label="predicted")
    known = [(p.setting.batch_size, p.measured / 1e6) for p in points if p.measured]
    if known:
        axes.plot(*zip(*known, strict=True), "x", color=ORANGE, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_title("Memory a device (one device only)", fontsize=11)
    axes.set_xlabel("examples a step")
    axes.set_ylabel("MB")
    axes.legend(frameon=False, fontsize=8)

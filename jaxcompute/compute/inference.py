"""How fast does the model answer? Latency and throughput on one device, and what each way of compiling it gave.

    serial      no jit: one operation after the other
    jit         the jitted model, parameters as arguments
    compiled    the same, compiled ahead of time
    constants   parameters in the program, so that XLA casts and lays them out once
    folded      each batch norm in the convolution or dense layer before it, as its statistics are constants

The ways take turns, so that what else the machine does in that time falls on all alike. The image lies on the device.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from jaxcompute import log, sharding, step, train
from jaxcompute.core import Experiment, PyTree, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCHES = (1, 32, 256)
SERIAL, JIT, COMPILED, CONSTANTS, FOLDED = WAYS = ("serial", "jit", "compiled", "constants", "folded")
CHANGE = {
    JIT: "jit over serial",
    COMPILED: "compiled ahead of time",
    CONSTANTS: "parameters as constants",
    FOLDED: "batch norm folded",
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2}  # of the largest output, between folded and not


class Point(NamedTuple):
    """A way at a batch size, and what it gave."""

    way: str
    batch_size: int
    calls: int
    p50: float  # ms from the call to the answer
    p90: float
    p99: float
    examples_per_sec: float  # with calls waiting in line


class Inference(NamedTuple):
    experiment: str
    device: str
    precision: str
    points: list[Point]
    folds: int  # batch norms that are folded
    error: float | None  # largest difference of a folded output, as a share of the largest output
    agreed: float | None  # share of the images whose largest output is the same one


# -- folding -----------------------------------------------------------------------------------------------------------


class Folding(NamedTuple):
    """A model's variables with batch norms folded away."""

    params: PyTree  # kernels and biases with the scale in them
    mutable: PyTree
    shifts: dict[tuple[str, ...], jax.Array]  # by the batch norm's path: all that is left of it, [C]


def fold(model: nn.Module, params: PyTree, mutable: PyTree, image: jax.Array) -> Folding:
    """Fold each batch norm (running averages) into the convolution or dense layer whose output it is given.

    y = (W x + b - mean) s + beta, where s = scale / sqrt(var + epsilon), is (W s) x + b s and a shift, beta - mean s.
    A layer whose output is used elsewhere as well can't be folded, and is not told apart here: compare the outputs.

    Args:
        image: [B, H, W, C], or its shape.
    """
    before = _pairs(model, {"params": params, **mutable}, image)
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(params)
    stats: dict[Any, Any] = flax.traverse_util.flatten_dict(mutable.get("batch_stats", {}))
    shifts = {}
    for norm, (layer, epsilon) in before.items():
        mean, var = stats[*norm, "mean"], stats[*norm, "var"]
        scale = flat.get((*norm, "scale"), 1.0) * jax.lax.rsqrt(var + epsilon)
        for name in ("kernel", "bias"):
            if (*layer, name) in flat:
                flat[*layer, name] = flat[*layer, name] * scale
        shifts[norm] = flat.get((*norm, "bias"), 0.0) - mean * scale
    return Folding(flax.traverse_util.unflatten_dict(flat), mutable, shifts)


def _pairs(model: nn.Module, variables: PyTree, image: Any) -> dict[tuple[str, ...], tuple[tuple[str, ...], float]]:
    """By a batch norm's path: that of the layer before it, and the epsilon."""
    made: dict[int, tuple[tuple[str, ...], Any]] = {}  # outputs of layers, kept so that no other gets their id
    found: dict[tuple[str, ...], tuple[tuple[str, ...], float]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and _is_norm(module) and id(args[0]) in made:
            found[module.path] = made[id(args[0])][0], module.epsilon
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense):
            made[id(out)] = module.path, out
        return out

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    return found


def _is_norm(module: nn.Module) -> bool:
    return module.has_variable("batch_stats", "mean") and hasattr(module, "epsilon")


def apply(exp: Experiment, folding: Folding, image: jax.Array) -> jax.Array:
    """The model's outputs, its folded batch norms adding their shifts alone."""

    def shifted(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and context.module.path in folding.shifts:
            return args[0] + folding.shifts[context.module.path].astype(args[0].dtype)
        return call(*args, **kwargs)

    with nn.intercept_methods(shifted):
        return step.forward(exp, folding.params, folding.mutable, image, train=False)[0]


# -- measuring ---------------------------------------------------------------------------------------------------------


def run(
    exp: Experiment, say: Callable[[str], None], seconds: float = 1.0, batches: Sequence[int] = BATCHES
) -> Inference:
    """Measure each way at each batch size for about so many seconds, compilation apart.

    The State is that of some training steps, so that the batch statistics are not those at the start.
    """
    config = dataclasses.replace(exp.config, mesh_data=1, mesh_fsdp=1, mesh_model=1, steps_per_call=1)
    device = jax.devices()[0]
    mesh = sharding.make_mesh(config, [device])
    program = train.compile(train.resolve(dataclasses.replace(exp, config=config), mesh), mesh)
    exp, state, sums = program.exp, program.init(), program.sums()
    for at in range(3):
        state, sums = program.steps(1)(state, sums, program.feed(at))
    program.close()
    params, mutable = step.evaluated(state)
    images = _images(exp, state, max(batches))
    folding = fold(exp.model, params, mutable, images)
    error = agreed = None
    if folding.shifts:
        error, agreed = compare(exp, params, mutable, folding, images)
        if not error <= TOLERANCE[exp.config.precision]:  # nor is NaN
            say(f"batch norm is not folded: that would change the outputs by {error:.2g} of the largest")
            folding = folding._replace(shifts={})
    points = []
    for size in batches:
        found = measure(ways(exp, params, mutable, folding, images[:size]), size, seconds)
        best = max(found, key=lambda point: point.examples_per_sec)
        say(f"batch {size}: {best.examples_per_sec:,.0f} examples/s, {min(p.p50 for p in found):.3g} ms")
        points += found
    name = train.name_of(exp)
    return Inference(name, device.device_kind, exp.config.precision, points, len(folding.shifts), error, agreed)


def _images(exp: Experiment, state: State, count: int) -> jax.Array:
    """[count, H, W, C] of the evaluation set, prepared; the same again where there are fewer."""
    source = exp.eval.with_batch_size(min(count, exp.eval.size))
    batch = exp.prepare(source.batch(jax.tree.map(jnp.asarray, source.feed(0)), jnp.int32(0)), state.key, False)
    source.close()
    image = batch["image"]
    return jnp.concatenate([image] * -(-count // len(image)))[:count]


def compare(
    exp: Experiment, params: PyTree, mutable: PyTree, folding: Folding, images: jax.Array
) -> tuple[float, float]:
    """The largest difference that folding makes to an output, as a share of the largest, and how many agree."""
    plain = jax.jit(lambda x: step.forward(exp, params, mutable, x, train=False)[0])(images)
    folded = jax.jit(lambda x: apply(exp, folding, x))(images)
    error = jnp.abs(plain - folded).max() / jnp.abs(plain).max()
    return float(error), float((plain.argmax(-1) == folded.argmax(-1)).mean())


def ways(
    exp: Experiment, params: PyTree, mutable: PyTree, folding: Folding, image: jax.Array
) -> dict[str, Callable[[], jax.Array]]:
    """Calls that answer for the image [B, H, W, C], by the name of the way."""

    def answer(params: PyTree, mutable: PyTree, image: jax.Array) -> jax.Array:
        return step.forward(exp, params, mutable, image, train=False)[0]

    def serial() -> jax.Array:
        with jax.disable_jit():
            return answer(params, mutable, image)

    jitted = jax.jit(answer)
    compiled = jitted.lower(params, mutable, image).compile()
    constants = jax.jit(lambda image: answer(params, mutable, image)).lower(image).compile()
    found: dict[str, Callable[[], jax.Array]] = {
        SERIAL: serial,
        JIT: lambda: jitted(params, mutable, image),
        COMPILED: lambda: compiled(params, mutable, image),
        CONSTANTS: lambda: constants(image),
    }
    if folding.shifts:
        folded = jax.jit(lambda image: apply(exp, folding, image)).lower(image).compile()
        found[FOLDED] = lambda: folded(image)
    return found


def measure(calls: dict[str, Callable[[], jax.Array]], batch_size: int, seconds: float, rounds: int = 8) -> list[Point]:
    """Each call for about so many seconds, in turns: one by one for their latency, then in line for the throughput."""
    took: dict[str, list[float]] = {way: [] for way in calls}
    rates: dict[str, list[float]] = {way: [] for way in calls}
    once = {way: min(_latency(call) for _ in range(4)) for way, call in calls.items()}  # the first is a warm-up
    for _ in range(rounds):
        for way, call in calls.items():
            count = max(1, min(1000, round(seconds / 2 / rounds / once[way])))
            took[way] += [_latency(call) for _ in range(count)]
            began = time.perf_counter()
            for _ in range(count - 1):
                call()
            jax.block_until_ready(call())
            rates[way].append(batch_size * count / (time.perf_counter() - began))
    points = []
    for way, times in took.items():
        cuts = [1e3 * cut for cut in statistics.quantiles(times, n=100, method="inclusive")]
        rate = statistics.median(rates[way])
        points.append(Point(way, batch_size, len(times), cuts[49], cuts[89], cuts[98], rate))
    return points


def _latency(call: Callable[[], jax.Array]) -> float:
    """Seconds."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


# -- showing -----------------------------------------------------------------------------------------------------------


def gain(found: Inference, way: str, batch_size: int) -> float | None:
    """How many times as fast as the way before it, by the median latency."""
    times = {point.way: point.p50 for point in found.points if point.batch_size == batch_size}
    order = [name for name in WAYS if name in times]
    place = order.index(way) if way in order else 0
    return times[order[place - 1]] / times[way] if place else None


def text(found: Inference) -> str:
    """Latencies and throughput of each way, then what each gave over the one before it."""
    sizes = list(dict.fromkeys(point.batch_size for point in found.points))
    rows = [
        (f"batch {p.batch_size:,}", p.way, f"{p.calls:,}", *(f"{x:.3g}" for x in p[3:6]), f"{p.examples_per_sec:,.0f}")
        for p in found.points
    ]
    headers = ("batch", "way", "calls", "p50 ms", "p90 ms", "p99 ms", "examples/s")
    gains = [(CHANGE[way], *(gain(found, way, size) for size in sizes)) for way in WAYS[1:]]
    gains = [(name, *(_times(x) for x in row)) for name, *row in gains if any(row)]
    whole = []
    for size in sizes:
        times = {point.way: point.p50 for point in found.points if point.batch_size == size}
        whole.append(_times(times[JIT] / min(times.values())))
    gains.append(("the best over jit", *whole))
    lines = [
        f"{found.experiment} on {found.device}, {found.precision}, one device",
        "",
        log.table(rows, headers, 2),
        "",
        log.table(gains, ("gave, by the median latency", *(f"batch {size:,}" for size in sizes)), 1),
        "",
        folded_text(found),
    ]
    return "\n".join(lines)


def folded_text(found: Inference) -> str:
    if found.error is None:
        return "no batch norm that follows a convolution or a dense layer: nothing to fold"
    how = f"{found.error:.1g} of the largest output; {found.agreed:.1%} of the answers are the same"
    return f"{found.folds} batch norms folded; they differ by {how}"


def _times(gain: float | None) -> str:
    return "" if gain is None else f"{gain:.2f}x" if gain < 10 else f"{gain:,.0f}x"


def to_json(found: Inference) -> dict[str, Any]:
    return found._asdict() | {"points": [point._asdict() for point in found.points]}


COLORS = {SERIAL: "#9aa3ad", JIT: "#a9c4e4", COMPILED: "#6f9fd0", CONSTANTS: "#2f6db3", FOLDED: "#d9822b"}


def picture(found: Inference) -> "Figure":
    """Latency by batch size, the thin lines up to p99, and throughput; the ways side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    latency, rate = figure.subplots(1, 2)
    sizes = list(dict.fromkeys(point.batch_size for point in found.points))
    shown = [way for way in WAYS if any(point.way == way for point in found.points)]
    width = 0.85 / len(shown)
    for place, way in enumerate(shown):
        points = [point for point in found.points if point.way == way]
        xs = [sizes.index(p.batch_size) + (place - (len(shown) - 1) / 2) * width for p in points]
        up = [[0.0] * len(points), [p.p99 - p.p50 for p in points]]
        style = {"width": 0.92 * width, "color": COLORS[way], "label": way}
        latency.bar(xs, [p.p50 for p in points], yerr=up, error_kw={"elinewidth": 1, "ecolor": "#555555"}, **style)
        rate.bar(xs, [p.examples_per_sec for p in points], **style)
        for x, p in zip(xs, points, strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            latency.text(x, p.p50 * 1.06, f"{p.p50:.2g}", ha="center", fontsize=8, bbox=box)
            rate.text(x, p.examples_per_sec * 1.05, log.quantity(p.examples_per_sec, ""), ha="center", fontsize=8)
    for axes, title, label in (
        (latency, "Latency, median: the lower the better (line: to p99)", "ms from call to answer"),
        (rate, "Throughput: the higher the better", "examples a second"),
    ):
        axes.set_xticks(range(len(sizes)), [f"batch {size:,}" for size in sizes])
        axes.set_yscale("log")
        axes.margins(y=0.12)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*rate.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    best = max(found.points, key=lambda point: point.examples_per_sec)
    fastest = min(found.points, key=lambda point: point.p50)
    figure.suptitle(
        f"{found.experiment} on {found.device}, {found.precision}: {fastest.p50:.2g} ms for a batch of "
        f"{fastest.batch_size}, {best.examples_per_sec:,.0f} examples/s at {best.batch_size:,}",
        fontsize=13,
    )
    return figure

"""For notebooks: the same training, its curves and predictions on the screen.

    run = fit(exp)                                       trains, with curves drawn live
    results = evaluate(exp, run.state)                   every example counted once
    probabilities = predict(exp, run.state, images)      [N, classes]
    show(confusion(results["confusion"], exp.classes))   a picture

`curves`, `gallery` and `confusion` return a matplotlib Figure, for `show` or `savefig`. matplotlib and IPython come
with the extra `notebook` and are imported only where something is drawn.
"""

import contextlib
import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompute import log, sharding, step, train
from jaxcompute.core import Batch, Experiment, State
from jaxcompute.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = dict[str, tuple[list[int], list[float]]]  # tag -> steps and values


class Trained(NamedTuple):
    """What `fit` returns."""

    state: State
    history: History
    exp: Experiment


# -- training and its results ------------------------------------------------------------------------------------------


def fit(exp: Experiment, workdir: str | Path | None = None, live: bool = True) -> Trained:
    """Train to the last step, as `train.fit`; in a notebook, one picture of the curves is drawn again and again.

    Args:
        exp: the experiment.
        workdir: where the run is left and goes on from, its history with it; None leaves nothing.
        live: draw, where there is a notebook to draw in.

    Raises:
        As `train.fit`.
    """
    workdir = Path(workdir) if workdir else None
    rows = log.read(workdir) if workdir else {}  # what a run that goes on writes again, it writes the same
    drawing = live and _in_notebook()
    if drawing:
        _figure(1, 1)  # imports matplotlib, or says that it is missing, before anything is trained
    picture, due = None, 0.0

    def draw() -> None:
        nonlocal picture, due
        began = time.monotonic()
        image = _image(curves(history(rows), steps=exp.steps))
        if picture is None:
            picture = _display(image, display_id=True)
        else:
            picture.update(image)
        now = time.monotonic()
        due = now + max(0.5, 4 * (now - began))  # a fifth of the time at most

    def write(at: int, values: dict[str, float]) -> None:
        if values:
            rows[at] = rows.get(at, {}) | values
            if drawing and time.monotonic() >= due:
                draw()

    try:
        state = train.fit(exp, workdir, write=write)
    except BaseException:
        if picture:
            draw()
        raise
    if drawing:
        draw()
    return Trained(state, history(rows), exp)


def history(rows: Mapping[int, Mapping[str, float]]) -> History:
    """Step -> values, as `log.read` returns them, turned into columns by tag."""
    columns: History = {}
    for at in sorted(rows):
        for tag, value in rows[at].items():
            steps, values = columns.setdefault(tag, ([], []))
            steps.append(at)
            values.append(value)
    return columns


def evaluate(exp: Experiment, state: State) -> dict[str, Any]:
    """The evaluation set's metrics, every example counted once: floats, and `confusion` [classes, classes]."""
    mesh = sharding.make_mesh(exp.config)
    with contextlib.closing(train.compile(train.resolve(exp, mesh), mesh)) as program:
        return train.evaluate(program, state)


def predict(exp: Experiment, state: State, images: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, by the averaged parameters where they are kept.

    By one forward pass, whatever the experiment's `eval_step` does.

    Args:
        exp: a classifier whose `prepare` asks for no label.
        state: as trained.
        images: [N, H, W, C], as the evaluation set holds them: not yet prepared.

    Returns:
        [N, classes], float32 or wider.

    Raises:
        BadInput: images of another shape or dtype than the evaluation set's, or none.
    """
    mesh = sharding.make_mesh(exp.config)
    exp = train.resolve(exp, mesh)
    images = np.asarray(images)
    like = jax.eval_shape(exp.eval.batch, exp.eval.like(), jnp.int32(0))["image"]
    if images.shape[1:] != like.shape[1:] or images.dtype.kind != like.dtype.kind or not len(images):
        wanted = f"{like.dtype} [N, {', '.join(map(str, like.shape[1:]))}]"
        raise BadInput(f"images are {images.dtype} {list(images.shape)}; give {wanted}, as in the evaluation set")

    @jax.jit
    def probabilities(state: State, batch: Batch) -> jax.Array:
        batch = exp.prepare(batch, state.key, False)
        outputs, _ = step.forward(exp, *step.evaluated(state), batch["image"], train=False)
        return jax.nn.softmax(outputs)

    rows = min(exp.eval.batch_size, -(-len(images) // mesh.size) * mesh.size)
    parts = []
    for at in range(0, len(images), rows):
        part = images[at : at + rows]
        padded = np.pad(part, [(0, rows - len(part)), *[(0, 0)] * (part.ndim - 1)])
        batch = sharding.put(mesh, sharding.BATCH, {"image": padded})
        parts.append(jax.device_get(probabilities(state, batch))[: len(part)])
    return np.concatenate(parts)


# -- pictures ----------------------------------------------------------------------------------------------------------

# Blue and vermillion stay apart for every kind of colour vision, as do the others in this order (Okabe and Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RIGHT, WRONG = COLORS[:2]
INK, FAINT = "#333333", "#D9D9D9"


def curves(
    *runs: History,
    names: Sequence[str] = (),
    metrics: Sequence[str] = ("loss", "accuracy"),
    steps: int | None = None,
) -> "Figure":
    """Metrics over the steps, in training and in evaluation, a panel each; the legend tells the last values.

    Args:
        runs: a history each; several are told apart by colour, training by its thin line.
        names: of the runs, where there are several.
        metrics: those that no run has are left out; an accuracy is in percent, what stays above 0 on a log scale.
        steps: where the axis ends; None: at the last step there is.
    """
    metrics = [name for name in metrics if any(f"{kind}/{name}" in run for run in runs for kind in ("train", "eval"))]
    several = len(runs) > 1
    figure = _figure(4.5 * max(1, len(metrics)), 3.2)
    for panel, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(1, len(metrics), panel)
        percent, seen = metric.startswith("accuracy"), []
        for i, run in enumerate(runs):
            for j, kind in enumerate(("train", "eval")):
                at, values = run.get(f"{kind}/{metric}", ([], []))
                if not at:
                    continue
                seen += values
                last = f"{values[-1]:.1%}" if percent else f"{values[-1]:.3g}"
                label = f"{names[i] if i < len(names) else f'run {i + 1}'}  {last}" if several else f"{kind}  {last}"
                axes.plot(
                    at,
                    values,
                    color=COLORS[(i if several else j) % len(COLORS)],
                    label=label if kind == "eval" or not several else None,
                    marker="o" if kind == "eval" else None,
                    markeredgecolor="white",
                    markersize=5,
                    linewidth=1 if several and kind == "train" else 1.8,
                    alpha=0.5 if several and kind == "train" else 1,
                    clip_on=False,
                    zorder=3,
                )
        _plain(axes)
        axes.set_title(metric, loc="left", fontsize=11, fontweight="bold", color=INK)
        if several:
            axes.set_title("thin: in training", loc="right", fontsize=9, color=INK)
        axes.set_xlabel("step")
        axes.set_xlim(0, steps or max(at[-1] for run in runs for at, _ in run.values()))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        if percent:
            axes.yaxis.set_major_formatter("{x:.0%}")
        elif min(seen) > 0:
            _log_scale(axes)
        axes.legend(loc="lower right" if percent else "upper right", frameon=False, labelcolor=INK)
    return figure


def gallery(
    images: np.ndarray,
    probabilities: np.ndarray,
    label: np.ndarray,
    classes: Sequence[str] = (),
    *,
    wrong_first: bool = True,
    rows: int = 3,
    columns: int = 8,
) -> "Figure":
    """Images, each with its prediction and the probability of it; a wrong one is framed, with what it is.

    Args:
        images: [N, H, W, C], C 1 (grey) or 3 (RGB), drawn from 0 to their largest value.
        probabilities: [N, classes], as from `predict`.
        label: int [N].
        classes: names; else their numbers.
        wrong_first: the wrong and surest first, then the right and least sure; else in the order given.
        rows, columns: at most.
    """
    names, right = _names(classes, probabilities.shape[-1]), probabilities.argmax(-1) == label
    order = np.arange(len(images))
    if wrong_first:
        order = np.lexsort((np.where(right, 1, -1) * probabilities.max(-1), right))
    order = order[: rows * columns]
    columns = max(1, min(columns, len(order)))
    rows = max(1, math.ceil(len(order) / columns))
    wrong_rows = sum(not right[order[at : at + columns]].all() for at in range(0, len(order), columns))
    top = max(float(images.max()), 1e-9)
    figure = _figure(9, rows * (9 / columns + 0.25) + wrong_rows * 0.2)
    for place, i in enumerate(order, 1):
        axes = figure.add_subplot(rows, columns, place)
        image = images[i] / top
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=not right[i], color=WRONG, linewidth=2.5)
        guess = names[probabilities[i].argmax()]
        axes.set_title(f"{guess}  {probabilities[i].max():.0%}", fontsize=9, color=INK, pad=4)
        if not right[i]:
            axes.set_xlabel(f"is {names[label[i]]}", fontsize=9, color=WRONG, fontweight="bold", labelpad=3)
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str] = ()) -> "Figure":
    """Counts, coloured by their share of the label's examples: right ones blue, mistakes vermillion.

    Args:
        counts: int [classes, classes], rows are labels and columns predictions.
        classes: names; else their numbers.
    """
    from matplotlib.colors import LinearSegmentedColormap

    size, names = len(counts), _names(classes, len(counts))
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)
    blue, red = (LinearSegmentedColormap.from_list("", ["white", color]) for color in (RIGHT, WRONG))
    right = np.eye(size, dtype=bool)
    shade = np.where(right, share, np.cbrt(share))  # mistakes are rare: one in a hundred is to be seen
    pixels = np.where(right[..., None], blue(shade), red(shade))

    figure = _figure(6.2, 5.4)
    axes = figure.add_subplot()
    axes.imshow(pixels, interpolation="nearest")
    _plain(axes)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if size <= 25:
        axes.set_xticks(range(size), names)
        axes.set_yticks(range(size), names)
        if max(map(len, names)) > 3:
            axes.tick_params(axis="x", rotation=45)
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        for i, j in zip(*np.nonzero(counts), strict=True):
            text = {"va": "center_baseline", "fontsize": 9, "color": "white" if shade[i, j] > 0.55 else INK}
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", **text)
        for i in range(size):
            accuracy = f"{share[i, i]:.1%}" if total[i] else ""
            axes.text(size - 0.3, i, accuracy, va="center_baseline", fontsize=9, color=INK)
        axes.text(size - 0.3, -0.75, "accuracy", va="center_baseline", fontsize=9, color=INK)
        axes.set_xticks(np.arange(0.5, size - 1), minor=True)
        axes.set_yticks(np.arange(0.5, size - 1), minor=True)
        axes.grid(which="minor", color=FAINT, lw=0.6)
        axes.tick_params(which="minor", length=0)
    return figure


def show(figure: "Figure") -> None:
    """Put a picture on the notebook's page; outside of a notebook nothing is shown."""
    if _in_notebook():
        _display(_image(figure))


# -- drawing: a Figure without pyplot, whose state is global and which would draw it a second time ---------------------


def _figure(width: float, height: float) -> "Figure":
    """An empty Figure; width and height in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install 'jaxcompute[notebook]'") from None
    return Figure((width, height), layout="constrained", facecolor="white")


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)


def _log_scale(axes: "Axes") -> None:
    """With plain numbers, and more than one even where the values lie within a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 1e3 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _names(classes: Sequence[str], count: int) -> np.ndarray:
    return np.array(classes if len(classes) == count else range(count)).astype(str)


def _image(figure: "Figure") -> Any:
    """For screens of two pixels a point."""
    from IPython.display import Image  # pyright: ignore[reportPrivateImportUsage]

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=192, metadata={"Software": None})
    return Image(png.getvalue(), format="png", retina=True)


def _display(image: Any, **how: Any) -> Any:
    from IPython.display import display

    return display(image, **how)


def _in_notebook() -> bool:
    """A shell with a kernel, and not a terminal's."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython(), "kernel") if ipython else False

"""What bounds a step, arithmetic or memory? (Williams, Waterman and Patterson 2009, "Roofline".)

A step that does I operations a byte it moves can't compute faster than min(peak, I * bandwidth). Both ceilings are
measured on this chip (ceilings.py). The bytes are those of operands and results, as if nothing of them lay in a cache:
what does lie there, as most of a small net does on a CPU, may stand above the slanted roof.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax

from jaxcompute import log
from jaxcompute.compute import ceilings, peaks
from jaxcompute.compute.profile import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Bound = Literal["arithmetic", "memory", "overhead"]
SLOW = 0.1  # of its roof: below that it is neither arithmetic nor memory that an instruction waits for


class Spot(NamedTuple):
    """A step or an instruction's runs in it, on one device."""

    name: str
    ms: float
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


class Roofline(NamedTuple):
    experiment: str
    device: str
    precision: str  # of the arithmetic whose peak it is
    peak: float  # FLOP/s, measured
    bandwidth: float  # bytes/s, measured
    step: Spot
    spots: list[Spot]  # the heaviest instructions, from the longest time to the shortest

    def roof(self, spot: Spot) -> float:
        """FLOP/s that it can reach at most."""
        return min(self.peak, spot.intensity * self.bandwidth)

    def share(self, spot: Spot) -> float:
        """Of what its roof allows: the least time that its operations and its bytes can take, over its own."""
        least = max(spot.flops / self.peak, spot.bytes / self.bandwidth)
        return least / (spot.ms / 1e3) if spot.ms else 0.0

    def bound(self, spot: Spot) -> Bound:
        if self.share(spot) < SLOW:
            return "overhead"
        return "arithmetic" if spot.intensity >= self.peak / self.bandwidth else "memory"


def run(profile: Profile, most: int = 10, seconds: float = 3.0) -> Roofline:
    """Measure the ceilings of the first device, and place a profile's step and its heaviest instructions below them."""
    device = jax.devices()[0]
    kind = peaks.arithmetic(device.device_kind, profile.precision)
    kind = "float32" if kind == "float64" else kind  # which no one trains in
    peak = ceilings.matmul(device, kind, seconds / 2)
    return place(profile, kind, peak, ceilings.copy(device, seconds / 2), most)


def place(profile: Profile, precision: str, peak: float, bandwidth: float, most: int = 10) -> Roofline:
    ops = [op for op in profile.ops if op.bytes and op.ms][:most]
    moved = sum(op.bytes for op in profile.ops)
    return Roofline(
        experiment=profile.experiment,
        device=profile.device,
        precision=precision,
        peak=peak,
        bandwidth=bandwidth,
        step=Spot("the step", profile.ms, profile.flops, moved),
        spots=[Spot(f"{op.place}: {op.kind}", op.ms, op.flops, op.bytes) for op in ops],
    )


# -- showing -----------------------------------------------------------------------------------------------------------


def text(found: Roofline) -> str:
    """The ceilings, then the step and its heaviest instructions with what bounds each."""
    rows = [
        (
            spot.name,
            found.bound(spot),
            f"{spot.ms:.3g}",
            f"{spot.intensity:.3g}",
            log.quantity(_rate(spot), "FLOP/s"),
            log.quantity(1e3 * spot.bytes / spot.ms, "B/s"),
            f"{found.share(spot):.0%}",
        )
        for spot in (found.step, *found.spots)
    ]
    headers = ("what", "bound by", "ms a step", "FLOP a byte", "reaches", "moves", "of its roof")
    ridge = found.peak / found.bandwidth
    return "\n".join(
        [
            f"roofs measured here: {log.quantity(found.peak, 'FLOP/s')} in {found.precision}, "
            f"{log.quantity(found.bandwidth, 'B/s')}; arithmetic bounds what does over {ridge:.3g} FLOP a byte",
            "",
            log.table(rows, headers, 2),
        ]
    )


def to_json(found: Roofline) -> dict[str, Any]:
    def plain(spot: Spot) -> dict[str, Any]:
        return spot._asdict() | {"bound": found.bound(spot), "share_of_roof": found.share(spot)}

    return found._asdict() | {"step": plain(found.step), "spots": [plain(spot) for spot in found.spots]}


INK, RED = "#333333", "#c23b3b"
COLORS: dict[Bound, str] = {"arithmetic": "#2f6db3", "memory": "#d9822b", "overhead": "#9aa3ad"}
MEANS: dict[Bound, str] = {
    "arithmetic": "bounded by arithmetic",
    "memory": "bounded by memory",
    "overhead": f"by neither: below {SLOW:.0%} of its roof",
}


def picture(found: Roofline) -> "Figure":
    """The roofs, the step as a star, and its heaviest instructions, the larger the longer they take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots()
    draw(axes, found)
    return figure


def draw(axes: Any, found: Roofline) -> None:
    """Onto matplotlib's axes; the names of the numbers stand to their right."""
    step, ridge = found.step, found.peak / found.bandwidth
    drawn = [spot for spot in found.spots if spot.flops and spot.ms]  # what computes nothing has no place here
    known = [step, *drawn]
    left = min([0.1 * ridge, *(0.4 * spot.intensity for spot in known)])
    right = max([10 * ridge, *(3 * spot.intensity for spot in known)])
    roof = [left, ridge, right], [left * found.bandwidth, found.peak, found.peak]
    axes.plot(*roof, color=INK, linewidth=2)
    axes.fill_between(*roof, color=INK, alpha=0.05, linewidth=0)
    axes.axvline(ridge, color=INK, linewidth=0.8, linestyle=":")
    peak, speed = log.quantity(found.peak, "FLOP/s"), log.quantity(found.bandwidth, "B/s")
    axes.text(right / 1.1, 1.12 * found.peak, f"the chip computes {peak} ({found.precision})", ha="right", fontsize=10)
    axes.text(1.1 * left, 0.5 * found.peak, f"its memory moves {speed}:\nthe slope", va="center", fontsize=10)
    longest = max((spot.ms for spot in drawn), default=1.0)
    for number, spot in reversed(list(enumerate(drawn, 1))):
        place, color = (spot.intensity, _rate(spot)), COLORS[found.bound(spot)]
        axes.scatter(*place, s=60 + 400 * spot.ms / longest, color=color, alpha=0.7, edgecolor="white", zorder=3)
        hidden = [other for other in drawn[: number - 1] if _near(spot, other)]
        away = (14 + 12 * len(hidden), 0) if hidden else (0, 0)
        text = {"ha": "center", "va": "center", "fontsize": 9, "color": color if hidden else "white"}
        axes.annotate(str(number), place, away, textcoords="offset points", weight="bold", zorder=4, **text)
    axes.scatter(step.intensity, _rate(step), s=420, marker="*", color=RED, edgecolor="white", zorder=5)
    axes.plot([step.intensity] * 2, [_rate(step), found.roof(step)], color=RED, linewidth=1, linestyle="--", zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low = 0.3 * min(_rate(spot) for spot in known)
    axes.set_ylim(low, 3 * found.peak)
    axes.set_xlim(left, right)
    for x, words, side in ((ridge / 1.15, "memory is the limit", "right"), (ridge * 1.15, "arithmetic is", "left")):
        axes.text(x, 1.2 * low, words, ha=side, fontsize=10, color=INK, style="italic")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: log.quantity(value, ""))
    axes.set_xlabel("operations for each byte moved (FLOP a byte)")
    axes.set_ylabel("operations a second (FLOP/s)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(sentence(found), fontsize=12, loc="left")
    _legend(axes, found, drawn)


def _near(one: Spot, other: Spot) -> bool:
    """Whether their marks would cover each other."""
    aside, above = abs(math.log(one.intensity / other.intensity)), abs(math.log(_rate(one) / _rate(other)))
    return aside < 0.3 and above < 0.6


def _legend(axes: Any, found: Roofline, drawn: Sequence[Spot]) -> None:
    y, style = 0.93, {"transform": axes.transAxes, "va": "top", "fontsize": 9}
    axes.text(1.02, 1.0, f"★  the whole step: {found.share(found.step):.0%} of its roof", color=RED, **style)
    for bound, color in COLORS.items():
        axes.text(1.02, y, f"●  {MEANS[bound]}", color=color, **style)
        y -= 0.05
    for number, spot in enumerate(drawn, 1):
        y -= 0.08
        time = f"{spot.ms / found.step.ms:.0%} of the step, {found.share(spot):.0%} of its roof"
        axes.text(1.02, y, f"{number}  {spot.name}\n    {time}", color=COLORS[found.bound(spot)], **style)


def _rate(spot: Spot) -> float:
    """FLOP/s."""
    return 1e3 * spot.flops / spot.ms


def sentence(found: Roofline) -> str:
    """What the picture says."""
    share = f"{found.share(found.step):.0%}"
    return (
        f"{found.experiment} on {found.device}: "
        + {
            "arithmetic": f"arithmetic bounds the step, which reaches {share} of the chip's peak",
            "memory": f"memory bounds the step, which reaches {share} of what it allows",
            "overhead": f"the step reaches {share} of what the chip allows: neither arithmetic nor memory is full",
        }[found.bound(found.step)]
    )

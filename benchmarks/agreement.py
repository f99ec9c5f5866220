"""Is it the same training on any number of devices and processes? And where float32 cannot be the same, is it chaos?

    python benchmarks/agreement.py          leaves benchmarks/results/agreement-<date>.json and docs/drift.png

The digits' MLP and CIFAR-10's ResNet-20 take their first 20 steps on 1, 2 and 4 devices of one process and on 2 and 4
processes over loopback; the loss of each step is compared with that of one device. Order, augmentation and dropout are
the same bits, so what differs is the order in which numbers are summed: 1e-16 of a sum in float64, 1e-7 in float32.

A residual network at a high learning rate makes much of such a difference; in float32 it trains here at the full rate
from the first step, without its warm-up. That the drift is chaos and no error is shown on one device alone: the same
run with its initial weights nudged by one part in ten million drifts in the same way.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import processor  # noqa: E402
from jaxcompute import log  # noqa: E402

EXPERIMENTS: dict[str, dict[str, Any]] = {"digits_mlp": {}, "cifar_resnet": {"batch_size": 32}}
FULL_RATE = {"cifar_resnet": {"warmup_epochs": 0.0}}  # in float32: at the peak from the first step
STEPS = 20
HEAD = "experiment", "precision", "against 1 device", "step 1", f"steps 1 to {STEPS}"
OVER: dict[str, dict[str, Any]] = {
    "1 device": {},
    "2 devices": {"devices": 2},
    "4 devices": {"devices": 4},
    "2 processes": {"processes": 2},
    "4 processes": {"processes": 4},
    "1 device, nudged": {"nudge": 1e-7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiments", nargs="+", default=[*EXPERIMENTS])
    parser.add_argument("--over", nargs="+", choices=OVER, default=[*OVER], help="what is compared with 1 device")
    parser.add_argument("--at_once", type=int, default=1, help="runs")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/agreement-{today}.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/drift.png")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(losses(**given.child)))
        return
    seen: dict[str, list[float]] = (log.read_json(given.out) or {}).get("losses", {})  # what is there is not run again
    cases = [
        (name, precision, over)
        for precision in ("float32", "float64")
        for name in given.experiments
        for over in OVER
        if over in ("1 device", *given.over)
        if precision == "float32" or "nudged" not in over
    ]

    def leave(**facts: Any) -> None:
        facts |= {"processor": processor(), "fields": EXPERIMENTS, "in_float32": FULL_RATE, "losses": dict(seen)}
        log.write_json(given.out, log.describe({}, device="cpu", **facts))

    def case(name: str, precision: str, over: str) -> None:
        key = f"{name}, {precision}, {over}"
        if key not in seen:
            seen[key] = run(name, precision, **OVER[over])
            leave()
            print(key, flush=True)

    with ThreadPoolExecutor(given.at_once) as pool:
        for done in [pool.submit(case, *each) for each in cases]:
            done.result()
    apart = {
        (name, precision, over): [
            abs(a - b) / abs(a)
            for a, b in zip(seen[f"{name}, {precision}, 1 device"], seen[f"{name}, {precision}, {over}"], strict=True)
        ]
        for name, precision, over in cases
        if over != "1 device"
    }
    rows = [(*key, by_step[0], max(by_step)) for key, by_step in apart.items()]
    print(log.table(rows, HEAD))
    leave(apart=[dict(zip(HEAD, row, strict=True)) for row in rows])
    picture(apart, given.picture)


def run(name: str, precision: str, devices: int = 1, processes: int = 1, nudge: float = 0.0) -> list[float]:
    """The loss of each step, from processes of their own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    children = []
    for i in range(processes):
        fields: dict[str, Any] = {"name": name, "precision": precision, "nudge": nudge}
        if processes > 1:
            fields["at"] = {"coordinator": f"127.0.0.1:{port}", "processes": processes, "process": i}
        command = [sys.executable, __file__, f"--child={json.dumps(fields)}"]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"{name} on {devices} devices of {processes} processes failed")
    return json.loads(said[0].splitlines()[-1])


def losses(name: str, precision: str, nudge: float, at: dict[str, Any] | None = None) -> list[float]:
    """In a process of its own."""
    import jax

    from jaxcompute import distributed, sharding, train
    from jaxcompute.metrics import compute

    if at:
        distributed.start(**at)
    jax.config.update("jax_enable_x64", precision == "float64")
    module = importlib.import_module(f"experiments.{name}")
    fields = EXPERIMENTS[name] | (FULL_RATE.get(name, {}) if precision == "float32" else {})
    exp = module.experiment(module.Config(precision=precision, steps=STEPS, **fields))
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    state, sums = program.init(), program.sums()
    if nudge:
        nudged = jax.jit(lambda params: jax.tree.map(lambda x: x * (1 + nudge), params))(state.params)
        state = dataclasses.replace(state, params=nudged)
    with distributed.together():  # all is compiled when the first collective comes, which waits for no more than 30 s
        call = program.steps(1)
    seen = []
    for step in range(STEPS):
        state, sums = call(state, sums, program.feed(step))
        seen.append(float(compute(jax.device_get(sums))["loss"]))
        sums = program.sums()
    return seen


def picture(curves: dict[tuple[str, str, str], list[float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, precision, over), apart in curves.items():
        if (name, precision) != ("cifar_resnet", "float32") and over != "4 devices":
            continue
        style = {"linestyle": "--", "color": "black"} if "nudged" in over else {}
        axes.semilogy(
            range(1, STEPS + 1), [max(x, 1e-17) for x in apart], label=f"{name}, {precision}, {over}", **style
        )
    axes.set(xlabel="step", ylabel="relative difference of the loss\nfrom one device", ylim=(1e-17, 1))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()

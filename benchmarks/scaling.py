"""What several processes and devices give and cost: time, memory and the bytes of their collectives.

    python benchmarks/scaling.py            ten minutes on two threads; leaves benchmarks/results/scaling-<date>.json

Time a step, over 1, 2 and 4 processes of one thread each, joined over loopback: weak (the batch grows with them) and
strong (it does not). Beside them the same processes without each other, "apart", each with its own batch: what the
machine itself loses where threads share a core, or there are fewer of them than processes. Weak against apart is what
working together costs. Each figure is the least median of several rounds; where others are at work on the machine, look
at the processor time of all processes together, which they disturb less.

Memory a device and the bytes of collectives a step come from the compiled program, on virtual devices, replicated and
fsdp; nothing of it is run.
"""

import argparse
import datetime
import importlib
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import processor  # noqa: E402
from jaxcompute import log  # noqa: E402
from jaxcompute.compute import hlo  # noqa: E402

TIMED: dict[str, dict[str, Any]] = {  # experiment -> its fields, of one process
    "digits_mlp": {"features": (1024, 1024), "batch_size": 256},
    "cifar_resnet": {"batch_size": 32},
}
COMPILED: dict[str, dict[str, Any]] = {
    "digits_mlp": {"features": (2048, 2048), "batch_size": 256},
    "cifar_resnet": {"batch_size": 64},
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", re.MULTILINE
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--experiments", nargs="+", default=[*TIMED])
    parser.add_argument("--rounds", type=int, default=7)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/scaling-{today}.json")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps({"timed": timed, "compiled": compiled}[given.child.pop("what")](**given.child)))
        return
    times = [row for name in given.experiments for row in scaling(name, given.processes, given.rounds)]
    print(log.table([list(row.values()) for row in times], list(times[0])), flush=True)
    programs = [
        child(what="compiled", name=name, devices=devices, rule=rule)
        for name in given.experiments
        for devices in given.devices
        for rule in ("replicate", "fsdp")[: 1 + (devices > 1)]
    ]
    shown = [{key: value for key, value in row.items() if key != "collectives"} for row in programs]
    print(log.table([list(row.values()) for row in shown], list(shown[0])))
    machine = {"threads": os.cpu_count(), "cores": cores(), "processor": processor(), "load": os.getloadavg()[0]}
    facts = {"machine": machine, "timed": TIMED, "compiled": COMPILED, "times": times, "programs": programs}
    log.write_json(given.out, log.describe({}, device="cpu", **facts))


# -- time --------------------------------------------------------------------------------------------------------------


def scaling(name: str, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each kind and number of processes."""
    each = TIMED[name]["batch_size"]
    rows, alone = [], None
    for count in counts:
        for kind in ("weak", "strong", "apart") if count > 1 else ("weak",):
            batch = {"weak": count * each, "strong": each, "apart": each}[kind]
            step_ms, cpu_ms = together(name, count, batch, rounds, joined=kind != "apart")
            alone = alone or (step_ms, cpu_ms)
            ideal = alone[0] / (count if kind == "strong" else 1)
            work = alone[1] * (1 if kind == "strong" else count)
            rows.append(
                {
                    "experiment": name,
                    "kind": kind if count > 1 else "one",
                    "processes": count,
                    "batch": batch,
                    "step_ms": round(step_ms, 3),
                    "examples_per_sec": round(batch / step_ms * 1e3 * (count if kind == "apart" else 1), 1),
                    "efficiency": round(ideal / step_ms, 3),
                    "cpu_ms": round(cpu_ms, 2),
                    "cpu_efficiency": round(work / cpu_ms, 3),
                }
            )
    return rows


def together(name: str, count: int, batch: int, rounds: int, joined: bool) -> tuple[float, float]:
    """Milliseconds of a step of the slowest of so many processes at work at once, and of all their processor time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = sorted(os.sched_getaffinity(0))
    fields = {"what": "timed", "name": name, "batch_size": batch, "rounds": rounds}
    children = []
    for i in range(count):
        at = {"coordinator": f"127.0.0.1:{port}", "processes": count, "process": i} if joined and count > 1 else {}
        children.append(start(**fields, thread=threads[i % len(threads)], **at))
    for process in children:
        assert process.stdout
        while (line := process.stdout.readline()) != "ready\n":  # gloo has its say first
            assert line, "a child has ended"
    for process in children:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [result(process) for process in children]
    return max(step_ms for step_ms, _ in found), sum(cpu_ms for _, cpu_ms in found)


def start(devices: int = 1, **fields: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, f"--child={json.dumps(fields)}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)


def result(process: subprocess.Popen[str]) -> Any:
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a child ended with exit code {process.returncode}")
    return json.loads(said.splitlines()[-1])


def child(devices: int, **fields: Any) -> Any:
    return result(start(devices=devices, **fields))


def timed(name: str, batch_size: int, rounds: int, thread: int, **at: Any) -> tuple[float, float]:
    """In a process of its own: milliseconds of a step and of its processor time, the least median of a round each."""
    os.sched_setaffinity(0, {thread})
    import jax

    from jaxcompute import distributed

    if at:
        distributed.start(**at)
    program = built(name, TIMED[name] | {"batch_size": batch_size})
    with distributed.together():  # the first collective waits for no more than 30 s
        call = program.steps(1)
    print("ready", flush=True)
    sys.stdin.readline()
    state, sums = program.init(), program.sums()
    reached, medians = 0, []
    for turn in range(rounds + 1):
        steps = []
        for _ in range(10 if turn else 2):
            began = time.perf_counter(), time.process_time()
            state, sums = call(state, sums, program.feed(reached))
            jax.block_until_ready(state.step)
            steps.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            reached += 1
        medians.append([1e3 * statistics.median(column) for column in zip(*steps, strict=True)])
    step_ms, cpu_ms = map(min, zip(*medians[1:], strict=True))  # the first few steps are not those of a run
    return step_ms, cpu_ms


def built(name: str, fields: dict[str, Any]) -> Any:
    """The experiment compiled for all devices."""
    from jaxcompute import sharding, train

    module = importlib.import_module(f"experiments.{name}")
    config = module.Config(precision="float32", **fields)
    mesh = sharding.make_mesh(config)
    return train.compile(train.resolve(module.experiment(config), mesh), mesh)


# -- memory and collectives --------------------------------------------------------------------------------------------


def compiled(name: str, rule: str) -> dict[str, Any]:
    """In a process of its own, with its virtual devices: what the compiled step holds and sends."""
    import jax

    devices = jax.device_count()
    split = {"mesh_data": 1, "mesh_fsdp": devices} if rule == "fsdp" else {}
    program = built(name, COMPILED[name] | split)
    found = collectives(program.steps(1).as_text())
    memory = program.memory()
    return {
        "experiment": name,
        "devices": devices,
        "rule": rule,
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract.params)),
        "bytes_parameters": memory["parameters"],
        "bytes_optimizer": memory["optimizer"],
        "bytes_activations": memory["activations and temporaries"],
        "bytes_collectives": sum(kind["bytes"] for kind in found.values()),
        "collectives": found,
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Of a compiled program's text: how many of each kind there are, and the bytes of their results on a device.

    One in a loop counts once. On a ring of n devices an all-reduce of b bytes has each send 2 b (n-1)/n, an all-gather
    or a reduce-scatter of a whole of b bytes half of that.
    """
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for shapes, kind in COLLECTIVE.findall(text):
        counts[kind] += 1
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes):
            total[kind] += hlo.BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return {kind: {"count": counts[kind], "bytes": total[kind]} for kind in sorted(counts)}


# -- the machine -------------------------------------------------------------------------------------------------------


def cores() -> int:
    """Physical ones; threads that share a core are one."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({file.read_text() for file in files}) or os.cpu_count() or 1


if __name__ == "__main__":
    main()

"""What do checkpoints cost the loop, and how soon is a killed run at work again?

    python benchmarks/checkpoints.py       about ten minutes; leaves benchmarks/results/checkpoints-<date>.json

Cost: cifar_resnet's own loop, `steps` at a time, by turns without a save and with one in their midst, manifest,
hashes and fsync included. What the save adds, in processor time of the whole process and in time, is set against the
minute between two saves. Pin it to one core (`taskset -c 0`): there all that a save computes is taken from the steps.

Recovery: `launch.py --experiment=cifar_resnet`, its compile cache warm, gets SIGKILL after a save, and the same command
is given at once. Counted is from the kill to the first step that the new life has done and logged.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import kills
from kills import ROOT

from experiments import cifar_resnet  # kills has put the repository's root on the path
from jaxcompute import checkpoint, log, sharding, train, verify

FIELDS = {"save_every": "3", "log_every": "1", "eval_every": "100000"}
MINUTE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="pairs of a stretch with a save and one without")
    parser.add_argument("--steps", type=int, default=8, help="of a stretch")
    parser.add_argument("--kills", type=int, default=10)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/checkpoints-{today}.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxcompute-checkpoints-") as folder:
        found = {**cost(Path(folder) / "cost", given.turns, given.steps), **recovery(Path(folder), given.kills)}
    print(log.table(list(found.items()), ("what", "value")))
    device = jax.devices()[0].device_kind
    facts = {"device": device, "processor": kills.processor(), "load": os.getloadavg()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log.write_json(given.out, log.describe(FIELDS, **facts, **found))


def cost(directory: Path, turns: int, steps: int) -> dict[str, Any]:
    """Medians over the turns."""
    config = cifar_resnet.Config()
    mesh = sharding.make_mesh(config)
    program = train.compile(train.resolve(cifar_resnet.experiment(config), mesh), mesh)
    state, sums, call = program.init(), program.sums(), program.steps(1)
    taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    held, at = [], 0
    with checkpoint.Saver(directory) as saver:
        for turn in range(2 * turns + 2):
            saves = turn % 2 == 1
            began, used = time.perf_counter(), time.process_time()
            for i in range(steps):
                state, sums = call(state, sums, program.feed(at))
                at += 1
                if saves and i == steps // 2:
                    jax.block_until_ready(state.params)  # else what it waits for would be called the save's
                    held.append(saver.save(state, {"accuracy": 0.5}))
            jax.block_until_ready(state.params)
            saver.wait()
            if turn > 1:  # the first two warm up
                taken[saves].append((time.perf_counter() - began, time.process_time() - used))
    program.close()
    (without, without_cpu), (with_, with_cpu) = [
        [statistics.median(column) for column in zip(*taken[saves], strict=True)] for saves in (False, True)
    ]
    manifest = checkpoint.manifest(directory, checkpoint.steps(directory)[-1])
    return {
        "bytes_a_checkpoint": sum(seal["bytes"] for seal in manifest["files"].values()),
        "turns": turns,
        "step_ms": 1e3 * without / steps,
        "save_holds_the_loop_ms": 1e3 * statistics.median(held),
        "save_adds_processor_ms": 1e3 * (with_cpu - without_cpu),
        "save_adds_ms": 1e3 * (with_ - without),
        "share_of_a_minute": max(with_ - without, with_cpu - without_cpu) / MINUTE,
    }


def recovery(folder: Path, count: int) -> dict[str, Any]:
    """Seconds from each kill to the first new step."""
    workdir, seconds = folder / "recovery", []
    kept = workdir / "checkpoints"
    process = kills.start(workdir, FIELDS, "cifar_resnet")
    for _ in range(count):
        before = max(checkpoint.steps(kept), default=0)
        wait(process, workdir, lambda before=before: max(checkpoint.steps(kept), default=0) > before)
        process.kill()
        process.wait()
        began, newest = time.perf_counter(), checkpoint.steps(kept)[-1]
        process = kills.start(workdir, FIELDS, "cifar_resnet")
        wait(process, workdir, lambda newest=newest: at_work(workdir) and max(log.read(workdir), default=0) > newest)
        seconds.append(round(time.perf_counter() - began, 2))
        print(f"killed after step {newest}: {seconds[-1]:.1f} s to the next", flush=True)
    process.kill()
    process.wait()
    warm = seconds[1:]  # the first life compiled
    return {"recovery_s": warm, "recovery_median_s": statistics.median(warm), "recovery_max_s": max(warm)}


def at_work(workdir: Path) -> bool:
    """Past the point where it has taken back the metrics of steps that were lost."""
    return "compiled in" in verify.screen(workdir).read_text()


def wait(process: subprocess.Popen, workdir: Path, condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            verify.finish(process, workdir)
            raise SystemExit("the run came to its end")
        time.sleep(0.01)


if __name__ == "__main__":
    main()

"""How fast does the stream decode photographs, who waits for whom in the loop, and does its memory stay flat?

    python benchmarks/loading.py            leaves benchmarks/results/loading-<date>.json

The photographs are 397 of ants and bees, DATA_DIR/downloads/hymenoptera, or any two folders given by --train_dir and
--eval_dir. They are small for photographs, so megapixels a second, before any shrinking, say more than images.

- decode: `imagenet_resnet50`'s stream alone, by 1 and 2 workers. Processor time is of all processes: others that are at
  work on the machine disturb it less than the clock.
- loop: a small form of `imagenet_resnet50` trains; `perf/data_wait_frac` of its logs, by workers.
- memory: 5,000 steps of the loop with a small MLP, all of it but the decoding cheap, so that the loop waits for data;
  resident memory of this process and of its workers on the way.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.machine import processor  # noqa: E402
from experiments import imagenet_resnet50  # noqa: E402
from jaxcompute import log, train  # noqa: E402
from jaxcompute.core import Experiment  # noqa: E402
from jaxcompute.data import sources, stream  # noqa: E402
from jaxcompute.models.mlp import MLP  # noqa: E402

BATCH = 64
SMALL: dict[str, Any] = {"depth": "18", "width": 16, "image_size": 96, "eval_short": 96, "eval_size": 96}
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    photographs = sources.data_dir() / "downloads/hymenoptera"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train_dir", type=Path, default=photographs / "train")
    parser.add_argument("--eval_dir", type=Path, default=photographs / "val")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, default=60, help="decoded by each")
    parser.add_argument("--steps", type=int, default=5000, help="that memory is watched for")
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/loading-{today}.json")
    given = parser.parse_args()
    folders = {"train_dir": str(given.train_dir), "eval_dir": str(given.eval_dir)}

    files = [file for file in given.train_dir.rglob("*") if file.is_file()]
    megapixels = statistics.mean(np.prod(Image.open(file).size) / 1e6 for file in files)
    images = {
        "files": len(files),
        "mean_megapixels": megapixels,
        "mean_bytes": statistics.mean(file.stat().st_size for file in files),
    }
    decoded = [decode(folders, workers, given.batches, megapixels) for workers in given.workers]
    print(log.table([list(row.values()) for row in decoded], list(decoded[0])), flush=True)
    looped = [loop(folders, workers) for workers in given.workers]
    print(log.table([list(row.values()) for row in looped], list(looped[0])), flush=True)
    memory = watch(folders, given.steps)
    print(log.table([(k, v) for k, v in memory.items() if k != "samples"], ("memory", "")))
    machine = {"threads": os.cpu_count(), "processor": processor(), "load": os.getloadavg()[0]}
    facts = {"machine": machine, "images": images, "decode": decoded, "loop": looped, "memory": memory}
    log.write_json(given.out, log.describe({}, device="cpu", **facts))


def decode(folders: dict[str, Any], workers: int, batches: int, megapixels: float) -> dict[str, Any]:
    train_files, _, _ = sources.files(folders["train_dir"], folders["eval_dir"])
    with contextlib.closing(stream.Workers(workers)) as pool:
        source = stream.shuffled(train_files, BATCH, 0, stream.whole(352), pool)
        for step in range(3):
            source.feed(step)
        began, spent = time.perf_counter(), processor_seconds(pool)
        for step in range(3, 3 + batches):
            source.feed(step)
        seconds, spent = time.perf_counter() - began, processor_seconds(pool) - spent
    count = batches * BATCH
    return {
        "workers": workers,
        "images_per_sec": round(count / seconds, 1),
        "megapixels_per_sec": round(count * megapixels / seconds, 1),
        "cpu_ms_an_image": round(1e3 * spent / count, 3),
        "images_per_cpu_sec": round(count / spent, 1),
    }


def processor_seconds(workers: stream.Workers) -> float:
    """Of this process and its workers."""
    total = time.process_time()
    for process in workers.processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICK
    return total


def loop(folders: dict[str, Any], workers: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"batch_size": 32, "steps": 60, "warmup_epochs": 0.0, "log_every": 20, "eval_every": 60}
    exp = imagenet_resnet50.experiment(imagenet_resnet50.Config(**(folders | SMALL | fields), workers=workers))
    seen: list[dict[str, float]] = []
    train.fit(exp, write=lambda step, values: seen.append(values), say=lambda text: None)
    found = [values for values in seen if "perf/examples_per_sec" in values][
        1:
    ]  # the first waits for the workers' start
    median = {tag: statistics.median(v[f"perf/{tag}"] for v in found) for tag in ("examples_per_sec", "data_wait_frac")}
    return {"workers": workers, **{tag: round(value, 3) for tag, value in median.items()}}


def watch(folders: dict[str, Any], steps: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"batch_size": 16, "canvas": 96, "image_size": 32, "eval_short": 32, "eval_size": 32}
    fields |= {
        "steps": steps,
        "warmup_epochs": 0.0,
        "eval_every": steps,
        "learning_rate": 0.01,
        "log_every": max(1, steps // 50),
    }
    exp: Experiment = imagenet_resnet50.experiment(imagenet_resnet50.Config(**(folders | fields)))
    exp = dataclasses.replace(exp, model=MLP((16,), len(exp.classes)))
    source: Any = exp.train
    samples: list[tuple[int, int, int]] = []
    waits: list[float] = []

    def sample(step: int, values: dict[str, float]) -> None:
        if "train/loss" in values:
            waits.append(values["perf/data_wait_frac"])
            children = [resident(process.pid) for process in source.workers.processes]
            samples.append((step, resident(os.getpid()), sum(children)))

    train.fit(exp, write=sample, say=lambda text: None)
    settled = [row for row in samples if row[0] >= steps // 10]
    step, own, children = (np.array(column, float) for column in zip(*settled, strict=True))
    return {
        "steps": steps,
        "images": steps * 16,
        "data_wait_frac": round(statistics.median(waits), 3),
        "bytes_here_at_a_tenth": int(own[0]),
        "bytes_here_at_the_end": int(own[-1]),
        "bytes_of_workers_at_a_tenth": int(children[0]),
        "bytes_of_workers_at_the_end": int(children[-1]),
        "bytes_a_step_here": float(np.polyfit(step, own, 1)[0]),
        "bytes_a_step_of_workers": float(np.polyfit(step, children, 1)[0]),
        "samples": samples,
    }


def resident(pid: int) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

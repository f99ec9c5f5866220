"""Damage the checkpoint of a real run 600 times, a file at a time, and look at whether anything passes in silence.

    python benchmarks/damage.py            about two minutes; leaves benchmarks/results/damage-<date>.json
    python benchmarks/damage.py --trials=20 --out=/tmp/damage.json

`launch.py` trains digits_mlp and saves four times. Each trial damages one file of the newest step, every file by turns:
500 times a bit is flipped or it is cut at a random byte, 100 times it has a byte more or is gone. Then the newest State
is restored, as a run that goes on does it. Right is: the damaged file is named, the step before is taken and said to
be, and its State is the one saved, bit for bit. Ten trials give a copy of the damaged work directory to `launch.py`
itself, which must go on from the step before and end with the State of the run that was left alone.
"""

import argparse
import datetime
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kills
from kills import ROOT

from jaxcompute import checkpoint, log, verify  # kills has put the repository's root on the path

FIELDS = {"steps": "40", "save_every": "10", "keep_last": "4", "eval_every": "20", "log_every": "20"}
HOW = ("one bit flipped", "cut"), ("a byte more", "gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=500, help=" and ".join(HOW[0]))
    parser.add_argument("--others", type=int, default=100, help=" and ".join(HOW[1]))
    parser.add_argument("--launches", type=int, default=10, help="of all these, those that launch.py goes through")
    parser.add_argument("--seed", type=int, default=0)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/damage-{today}.json")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxcompute-damage-"))
    print(f"in {folder}", flush=True)
    results = benchmark(folder, given.trials, given.others, given.launches, random.Random(given.seed))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log.write_json(given.out, results)
    print(log.table(list(results["trials"].items()), ("damage", "trials")))
    print("\n".join(results["silent"][:20]) or f"{sum(results['trials'].values())} trials, 0 silent")
    if not results["silent"]:
        shutil.rmtree(folder)
    sys.exit(1 if results["silent"] else 0)


def benchmark(folder: Path, trials: int, others: int, launches: int, rng: random.Random) -> dict[str, Any]:
    began, done, silent = time.monotonic(), Counter[str](), []
    run = folder / "run"
    verify.finish(kills.start(run, FIELDS), run)
    directory, like = run / "checkpoints", kills.shapes(FIELDS)
    saved = checkpoint.steps(directory)
    digests = {step: checkpoint.manifest(directory, step)["digest"] for step in saved}
    newest, before = saved[-1], saved[-2]
    files = sorted(path for path in (directory / str(newest)).rglob("*") if path.is_file())

    launched = rng.sample(range(trials + others), launches)
    for trial in range(trials + others):
        file, how = files[trial % len(files)], rng.choice(HOW[trial >= trials])
        name, whole = file.relative_to(directory / str(newest)), file.read_bytes()
        damage(file, how, rng)
        words: list[str] = []
        if trial not in launched:
            step, state = checkpoint.restore_newest(directory, like, words.append) or (0, None)
            equal = step == before and checkpoint.digest(state) == digests[before]
        else:
            equal = resumed(run, folder / "damaged", before, digests[newest], words)
        told = any(f"{newest} is damaged: {name}: " in line for line in words)
        if not (equal and told and any(f"{before} instead" in line for line in words)):
            silent.append(f"trial {trial}: {name}, {how}: {words[:2]}, {'the right' if equal else 'another'} State")
        done[how] += 1
        file.write_bytes(whole)
        if trial % 100 == 99:
            print(f"{trial + 1} trials, {time.monotonic() - began:.0f} s, {len(silent)} silent", flush=True)

    config = log.read_json(run / "config.json") or {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/damage.py", *sys.argv[1:]]),
        "device": config["device"],
        "processor": kills.processor(),
        "versions": config["versions"],
        "git": config["git"],
        "fields": FIELDS,
        "files": len(files),
        "trials": dict(done.most_common()),
        "of_which_by_launch": launches,
        "silent": silent,
        "seconds": round(time.monotonic() - began),
    }


def damage(file: Path, how: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
        return
    if how == "one bit flipped":
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    elif how == "cut":
        content = content[: rng.randrange(len(content))]
    else:
        content.append(rng.randrange(256))
    file.write_bytes(content)


def resumed(run: Path, copy: Path, before: int, digest: str, words: list[str]) -> bool:
    """Whether the same command, on a damaged copy, goes on from the step before to the same State."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "status.json").unlink()
    verify.finish(kills.start(copy, FIELDS), copy)
    words += verify.screen(copy).read_text().splitlines()
    return f"resuming at step {before}" in "\n".join(words) and log.read_status(copy).get("digest") == digest


if __name__ == "__main__":
    main()

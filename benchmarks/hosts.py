"""Do two hosts train as one process does? The first steps of cifar_resnet and a whole evaluation, in float64.

    sudo python benchmarks/hosts.py     some minutes of a processor; leaves benchmarks/results/hosts-<date>.json

Each host is a network namespace of this machine with an address, a name and a loopback of its own; one wire joins the
two. On each runs `launch.py`, which finds the other by address alone. Every value that they log, of training and of the
evaluation's 10,000 images, is compared with the single process's: none may be further off than 1e-12 of itself, but for
the gradient's norm, which is told alone: what moves the loss by so little moves it by more.
"""

import argparse
import contextlib
import datetime
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import processor  # noqa: E402
from jaxcompute import log  # noqa: E402

ADDRESSES = "10.77.0.1", "10.77.0.2"
TOLERANCE = 1e-12


class NotAllowed(Exception):
    """No network namespaces here; the message says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiment", default="cifar_resnet")
    parser.add_argument("--steps", type=int, default=20)
    today = datetime.datetime.now(datetime.UTC).date()
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/hosts-{today}.json")
    given = parser.parse_args()
    flags = [f"--experiment={given.experiment}", "--config.precision=float64", f"--config.steps={given.steps}"]
    flags += ["--config.log_every=1"]
    with tempfile.TemporaryDirectory(prefix="jaxcompute-hosts-") as folder, hosts(Path(folder)) as prefixes:
        one, two = Path(folder) / "one", Path(folder) / "two"
        run(flags, one, [[]])
        run(flags, two, prefixes)
        apart = differences(one, two)
    print(log.table([(tag, f"{value:.1e}") for tag, value in apart.items()], ("value", "largest relative difference")))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/hosts.py", *sys.argv[1:]]),
        "processor": processor(),
        "versions": log.versions(),
        "flags": flags,
        "largest_relative_difference": apart,
        "tolerance": TOLERANCE,
    }
    log.write_json(given.out, facts)
    judged = [value for tag, value in apart.items() if tag != "train/grad_norm"]
    sys.exit(max(judged, default=math.inf) > TOLERANCE)


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[list[list[str]]]:
    """Two; for each, the command that runs a command there.

    Args:
        folder: for a file that gives them their names, host1 and host2.

    Raises:
        NotAllowed: it needs root, iproute2, util-linux and a kernel that lets it.
    """
    if os.geteuid() or not shutil.which("ip") or not shutil.which("nsenter"):
        raise NotAllowed("network namespaces need root, iproute2 and util-linux")
    spaces = [f"jaxcompute-{os.getpid()}-{i}" for i in (0, 1)]
    wires = [f"jc{os.getpid()}-{i}" for i in (0, 1)]
    commands = [f"netns add {space}" for space in spaces]
    commands += [f"link add {wires[0]} netns {spaces[0]} type veth peer name {wires[1]} netns {spaces[1]}"]
    for space, wire, address in zip(spaces, wires, ADDRESSES, strict=True):
        commands += [f"-n {space} addr add {address}/24 dev {wire}"]
        commands += [f"-n {space} link set {device} up" for device in (wire, "lo")]
    try:
        for command in commands:
            made = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if made.returncode:
                raise NotAllowed(f"network namespaces are not allowed here: {made.stderr.strip()}")
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} host{a[-1]}\n" for a in ADDRESSES))
        host = f'hostname "$0" && mount --bind {folder}/hosts /etc/hosts && exec "$@"'
        # nsenter, as `ip netns exec` would hide the cgroups that Slurm looks for
        own = ["unshare", "--uts", "--mount", "sh", "-c", host]
        yield [
            ["nsenter", f"--net=/run/netns/{space}", *own, f"host{address[-1]}"]
            for space, address in zip(spaces, ADDRESSES, strict=True)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def run(flags: list[str], workdir: Path, prefixes: list[list[str]], seconds: float = 1800) -> None:
    """launch.py, a process for each prefix of its command; several join at host1. None outlives the call.

    Raises:
        RuntimeError: one failed, or has not ended after so many seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes, end = [], time.monotonic() + seconds
    try:
        for i, prefix in enumerate(prefixes):
            command = [*prefix, sys.executable, str(ROOT / "launch.py"), *flags, f"--workdir={workdir}"]
            if len(prefixes) > 1:
                command += [f"--coordinator=host1:{port}", f"--processes={len(prefixes)}", f"--process={i}"]
            env = os.environ | {"JAX_PLATFORMS": "cpu"}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=sys.stderr))
        codes = [process.wait(max(0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a process has not ended after {seconds:.0f} s") from None
    finally:
        for process in processes:
            process.kill()  # the prefixes replace themselves by what they start
            process.wait()
    if any(codes):
        raise RuntimeError(f"{sum(map(bool, codes))} of {len(codes)} processes failed")


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of each value that two runs logged, over their steps."""
    found: dict[str, float] = {}
    wanted, given = log.read(one), log.read(other)
    for step in sorted(wanted.keys() | given.keys()):
        a, b = wanted.get(step, {}), given.get(step, {})
        for tag in sorted(a.keys() | b.keys()):
            if not tag.startswith(("perf/", "mem/")):
                found[tag] = max(found.get(tag, 0.0), difference(a.get(tag, math.nan), b.get(tag, math.nan)))
    return found


def difference(a: float, b: float) -> float:
    """Relative to a; infinite where one of them is missing or not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / abs(a) if a else math.inf if b else 0.0


if __name__ == "__main__":
    main()

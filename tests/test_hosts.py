"""Two hosts: network namespaces with an address, a name and a loopback of their own, joined by one wire."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_distributed import ROOT, close, launch

from jaxcompute import checkpoint

ADDRESSES = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """For each host, the command that runs a command there."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, iproute2 and util-linux")
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
                pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} host{a[-1]}\n" for a in ADDRESSES))
        host = f'hostname "$0" && mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"'
        yield [
            ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "sh", "-c", host, f"host{address[-1]}"]
            for space, address in zip(spaces, ADDRESSES, strict=True)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def test_two_hosts_of_two_processes_train_as_one_process(hosts, launcher, tmp_path):
    flags = ["--experiment=digits_cnn", "--config.features=8", "--config.dense=16", "--config.steps=40"]
    flags += ["--config.log_every=10", "--config.eval_every=20"]
    assert launcher(*flags, f"--workdir={tmp_path / 'one'}", cwd=ROOT).code == 0
    placed = [hosts[0], hosts[0], hosts[1], hosts[1]]
    ended = launch(*flags, f"--workdir={tmp_path / 'four'}", n=4, at="host1", hosts=placed).end()
    assert [code for code, _ in ended] == [0, 0, 0, 0], ended
    assert any("4 x cpu" in line for line in ended[0][1]) and not any(said for _, said in ended[1:])
    assert checkpoint.steps(tmp_path / "four/checkpoints") == [20, 40]
    close(tmp_path / "one", tmp_path / "four")

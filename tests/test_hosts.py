"""Two hosts of benchmarks/hosts.py: network namespaces, joined by one wire."""

import pytest

from benchmarks import hosts
from jaxcompute import checkpoint


def test_two_hosts_of_two_processes_train_as_one_process(tmp_path, capfd):
    flags = ["--experiment=digits_cnn", "--config.features=8", "--config.dense=16", "--config.steps=40"]
    flags += ["--config.log_every=10", "--config.eval_every=20", "--config.precision=float64"]
    try:
        with hosts.hosts(tmp_path) as (first, second):
            hosts.run(flags, tmp_path / "one", [[]])
            capfd.readouterr()
            hosts.run(flags, tmp_path / "four", [first, first, second, second])
    except hosts.NotAllowed as why:
        pytest.skip(str(why))
    said = capfd.readouterr()
    assert "4 x cpu" in said.err and said.err.count("State of step 40:") == 1
    assert checkpoint.steps(tmp_path / "four/checkpoints") == [20, 40]
    apart = hosts.differences(tmp_path / "one", tmp_path / "four")
    assert {"train/loss", "eval/loss", "eval/accuracy", "eval/ece"} <= apart.keys()
    assert max(apart.values()) < hosts.TOLERANCE, apart

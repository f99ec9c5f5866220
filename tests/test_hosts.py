"""Two hosts of benchmarks/hosts.py: network namespaces and one wire; where there may be none, skipped, even in CI."""

import json
import math
import os

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


def test_what_is_missing_or_not_finite_is_infinitely_apart(tmp_path):
    def logged(name: str, *rows: dict[str, float | None]):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"step": step, "time": 0.0} | row) for step, row in enumerate(rows))
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        return tmp_path / name

    one = logged(
        "one", {"same": 0.0, "off": 2.0, "zero": 0.0, "nan": None, "alone": 1.0, "perf/ms": 1.0}, {"last": 1.0}
    )
    other = logged("other", {"same": 0.0, "off": 3.0, "zero": 1.0, "nan": None, "new": 1.0, "perf/ms": 2.0})
    apart = hosts.differences(one, other)
    assert (apart.pop("same"), apart.pop("off")) == (0.0, 0.5)
    assert apart == dict.fromkeys(("zero", "nan", "alone", "new", "last"), math.inf)


def test_no_process_outlives_a_run_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    shell = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"]
    with pytest.raises(RuntimeError, match="not ended after 2 s"):
        hosts.run([], tmp_path, [shell], seconds=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(RuntimeError, match="1 of 2 processes failed"):
        hosts.run([], tmp_path, [["true"], ["false"]])

"""benchmarks/layers.py as a whole, on small layers."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import layers


def test_each_layer_is_timed_beside_the_other(tmp_path):
    out = tmp_path / "layers.json"
    flags = ["--tiny", "--precisions=float32", "--rounds=2", "--seconds=0.001", f"--out={out}"]
    command = [sys.executable, layers.__file__, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == 0, ended
    timings = json.loads(out.read_text())["timings"]
    whats = [timing["what"] for timing in timings]
    assert whats == ["forward", "input's gradient", "kernel's gradient", "both", "both", "both"]
    for timing in timings:
        assert min(timing["ours_ms"], timing["theirs_ms"], timing["ratio"]) > 0
        assert timing["layer"] in ended.stdout and timing["layer"] in ended.stderr


def test_what_is_xlas_to_the_letter_is_left_out():
    whats = [case.what for case in layers.convolution("", (2, 8, 8, 32), (1, 1, 32, 512), 1, "SAME", "float32")]
    assert "forward" not in whats


def test_layers_that_do_not_agree_are_told_and_not_timed(monkeypatch):
    case = layers.Case("a layer", "forward", lambda x: 1.001 * x, lambda x: x, (jnp.ones(3),))
    with pytest.raises(layers.Differ, match=r"a layer, forward: 0\.001 from the other in float32"):
        layers.timed(case, "float32", 1, 0.001)
    assert layers.timed(case, "bfloat16", 1, 0.001).ratio > 0
    monkeypatch.setattr(layers, "cases", lambda *_: [case, case._replace(layer="another", theirs=case.ours)])
    told = []
    (timing,) = layers.compare(["float32"], 1, 0.001, differs=told.append)
    assert timing.layer == "another" and len(told) == 1 and told[0].startswith("a layer, forward")


def test_an_unknown_precision_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layers.py", "--precisions=float32,int8"])
    with pytest.raises(SystemExit) as ended:
        layers.main()
    assert ended.value.code == 2 and "no int8; give of float32, bfloat16" in capsys.readouterr().err

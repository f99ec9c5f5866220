"""benchmarks/scaling.py, agreement.py and loading.py with their smallest sizes, and what they read from a program."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny
from test_experiments import pictures

from benchmarks import loading, scaling
from jaxcompute import sharding, train

ROOT = Path(__file__).parents[1]
TEXT = """
  %all-reduce.1 = (f32[10,5]{1,0}, /*index=1*/f32[]) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%c), dimensions={0}
  ROOT %all-reduce-start = pred[] all-reduce-start(%d), channel_id=2
  %all-reduce-done = pred[] all-reduce-done(%all-reduce-start)
  %fusion = f32[7]{0} fusion(%all-reduce.1), metadata={op_name="all-reduce("}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
    assert scaling.collectives(TEXT) == {
        "all-gather": {"count": 1, "bytes": 64},
        "all-reduce": {"count": 2, "bytes": 4 * 51 + 1},
    }


def test_a_step_over_devices_sends_its_gradient_once_and_one_device_nothing():
    def sent(devices: int) -> dict[str, dict[str, int]]:
        exp = tiny.mlp(mesh_data=devices)
        mesh = sharding.make_mesh(exp.config)
        program = train.compile(train.resolve(exp, mesh), mesh)
        gradient = 4 * sum(x.size for x in jax.tree.leaves(program.abstract.params))
        found = scaling.collectives(program.steps(1).as_text() or "")
        assert devices == 1 or gradient <= found["all-reduce"]["bytes"] < gradient + 100  # and a few scalars of metrics
        return found

    assert sent(1) == {}
    assert set(sent(4)) == {"all-reduce"}


def leaves(out: Path, script: str, *flags: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--experiments", "digits_mlp", *flags, f"--out={out}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(out.read_text())


def test_times_and_programs_of_two_processes_and_devices(tmp_path):
    found = leaves(tmp_path / "scaling.json", "scaling.py", "--processes", "2", "--devices", "2", "--rounds=1")
    times, programs = found["times"], found["programs"]
    assert [(row["kind"], row["batch"]) for row in times] == [("weak", 512), ("strong", 256), ("apart", 256)]
    assert all(row["step_ms"] > 0 and row["cpu_ms"] > 0 for row in times)
    replicated, split = programs
    assert (replicated["rule"], split["rule"]) == ("replicate", "fsdp")
    assert 1.9 < replicated["bytes_parameters"] / split["bytes_parameters"] <= 2
    assert replicated["bytes_collectives"] == pytest.approx(4 * replicated["parameters"], abs=100)


def test_four_devices_and_two_processes_agree_with_one_device(tmp_path):
    picture = tmp_path / "drift.png"
    cases = ["4 devices", "2 processes"]
    found = leaves(tmp_path / "agreement.json", "agreement.py", "--over", *cases, f"--picture={picture}")
    apart = {(row["precision"], row["against 1 device"]): row["steps 1 to 20"] for row in found["apart"]}
    assert apart.keys() == {(precision, over) for precision in ("float32", "float64") for over in cases}
    assert all(most < (1e-6 if precision == "float32" else 1e-12) for (precision, _), most in apart.items())
    assert picture.stat().st_size > 5_000
    assert found["processor"]


def test_decoding_is_timed_with_its_processor_time(tmp_path):
    found = loading.decode(pictures(tmp_path), workers=1, batches=2, megapixels=0.012)
    assert found["megapixels_per_sec"] == pytest.approx(0.012 * found["images_per_sec"], abs=0.1)
    assert 0 < found["cpu_ms_an_image"] == pytest.approx(1e3 / found["images_per_cpu_sec"], rel=0.1)

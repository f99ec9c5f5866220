"""The benchmark's arithmetic on made-up points, and one real run on two devices."""

import contextlib
import dataclasses
import itertools
import json

import jax
import pytest
import tiny

from jaxcompute import sharding, train
from jaxcompute.compute import benchmark, profile
from jaxcompute.compute.benchmark import Point, Setting
from jaxcompute.errors import BadInput
from jaxcompute.models.mlp import MLP

ROOFS = benchmark.Roofs({"float32": 1e11, "bfloat16": 2e11}, 1e10, "made up")


def point(ms: float, batch_size: int = 64, devices: int = 1, jit: bool = True) -> Point:
    rate = 1e3 * batch_size / ms
    return Point(
        Setting("float32", batch_size, devices, 1, jit), ms, 0.01, rate, 0.4, 0.2, 10**9, None, 0.0, None, None
    )


@pytest.mark.parametrize("serial", [0.0, 0.1, 0.5, 1.0])
def test_amdahls_law_is_found_again(serial):
    points = [point(10 * (serial + (1 - serial) / n), devices=n) for n in (1, 2, 4, 8)]
    assert benchmark.amdahl(points) == pytest.approx(serial)
    assert benchmark.amdahl(points[:1]) is None


@pytest.mark.parametrize(("total", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_device_counts_end_with_all(total, counts):
    assert benchmark.counts(total) == counts


def test_a_chip_without_tensor_cores_for_it_is_not_asked_for_tf32():
    assert benchmark.precisions("gpu", "NVIDIA H100 80GB HBM3") == ("float32", "tensorfloat32", "bfloat16")
    assert benchmark.precisions("gpu", "Tesla T4") == ("float32", "bfloat16")
    assert benchmark.precisions("cpu", "cpu") == ("float32", "bfloat16")


def test_the_table_says_what_is_known_and_no_more():
    ladder = [point(640.0, jit=False), point(10.0), point(2.0, batch_size=128)]
    one = benchmark.Benchmark("digits", "a chip", 1, ROOFS, ladder, ladder[1:], [], [], None)
    shown = benchmark.text(one)
    assert "one device only (a chip)" in shown
    for words in ("serial, float32, batch 64", "64x", "640x", "40%", "1 GB", "made up: float32 100 GFLOP/s"):
        assert words in shown
    assert "J/example" not in shown and "measured" not in shown.splitlines()[0]
    strong = [point(8.0), point(5.0, devices=2)]
    two = one._replace(devices=2, strong=strong, weak=[point(8.0), point(8.0, 128, 2)], serial_share=0.25)
    row = benchmark.text(two).splitlines()
    assert any(line.split() == ["2", "5", "1.60x", "80%", "8", "2.00x", "100%"] for line in row)
    assert "serial share of 25.0%: at most 4.0x" in benchmark.text(two)


def test_a_measured_roof_is_the_higher_of_two_and_shares_are_of_it():
    again = benchmark.Roofs({"float32": 2e11, "bfloat16": 1e11}, 4e10, "made up")
    best = benchmark.higher(ROOFS, again)
    assert best == benchmark.Roofs({"float32": 2e11, "bfloat16": 2e11}, 4e10, "made up")
    found = benchmark.below(point(8.0), ROOFS, best)
    assert (found.mfu, found.bandwidth) == (0.2, 0.05)
    assert benchmark.below(found._replace(mfu=None, bandwidth=None), ROOFS, best).mfu is None


class Streamed:
    """A source whose batches come from the host."""

    resident, size, steps = False, 61, 8

    def __init__(self, batch_size: int):
        self.batch_size = batch_size

    def like(self):
        return tiny.arrays(self.batch_size)

    def feed(self, step, index=0, count=1):
        return tiny.arrays(self.batch_size)

    def batch(self, feed, step):
        return feed

    def with_batch_size(self, batch_size):
        return Streamed(batch_size)

    def close(self):
        pass


def test_streamed_batches_are_measured_too(tmp_path):
    exp = dataclasses.replace(tiny.mlp(MLP((16,), 3), mesh_data=1), train=Streamed(8))
    found = benchmark.measure(exp, Setting("float32", 16), ROOFS, seconds=0.05)
    assert found.bandwidth > 0 and 0 < found.data <= 1
    traced = profile.run(exp, tmp_path, seconds=0.05)
    assert any(op.place == "Dense_0" for op in traced.ops)


def test_one_device_of_a_mesh_and_any_micro_batches(monkeypatch):
    monkeypatch.setattr(benchmark, "roofs", lambda: ROOFS)
    monkeypatch.setattr(benchmark.jax, "devices", lambda all=benchmark.jax.devices: all()[:2])
    exp = tiny.mlp(MLP((16,), 3), batch_size=32, accumulate=4, mesh_model=2)
    found = benchmark.run(exp, lambda text: None, seconds=0.01)
    assert [p.setting.batch_size for p in found.batches] == [8, 32, 60]  # of 61 examples


def measured_but(*unfit: Setting):
    """What stands in for `measure`: there is no memory for some settings."""

    def measure(exp, setting, roofs, seconds):
        if setting in unfit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 TiB")
        return point(10.0, *setting[1:3], setting.jit)._replace(setting=setting)

    return measure


def test_a_setting_that_does_not_fit_is_left_out_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "roofs", lambda: ROOFS)
    monkeypatch.setattr(benchmark.jax, "devices", lambda all=benchmark.jax.devices: all()[:2])
    exp, said = tiny.mlp(batch_size=16), []
    unfit = [Setting("float32", 16, jit=False), Setting("float32", 61), Setting("float32", 32, 2)]
    monkeypatch.setattr(benchmark, "measure", measured_but(*unfit))
    found = benchmark.run(exp, said.append)
    assert {line.split(":")[0] for line in said if "does not fit" in line} == set(map(benchmark.describe, unfit))
    assert [p.setting.batch_size for p in found.batches] == [4, 16]
    assert found.ladder[0].setting == Setting("float32", 16) and len(found.strong) == 2 and len(found.weak) == 1
    assert "over serial" not in benchmark.text(found)
    benchmark.picture(found).savefig(tmp_path / "all.png")
    monkeypatch.setattr(benchmark, "measure", measured_but(Setting("float32", 16)))
    with pytest.raises(BadInput, match="batch_size=16 does not fit one device"):
        benchmark.run(exp, said.append)


def test_a_large_batch_may_be_measured_for_an_experiment_of_many_steps():
    exp = benchmark.placed(tiny.mlp(steps=2**20), Setting("float32", 2**15))
    assert train.resolve(exp, sharding.make_mesh(exp.config)).train.batch_size == 2**15
    assert benchmark.placed(tiny.mlp(), Setting("float32", 16)).steps == 12  # for that many, batches are made ahead


def test_a_real_step_is_measured_over_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "roofs", lambda: ROOFS)
    monkeypatch.setattr(benchmark.jax, "devices", lambda all=benchmark.jax.devices: all()[:2])
    metered, joules = [], itertools.count()

    @contextlib.contextmanager
    def meter(devices):
        metered.append(len(devices))
        yield lambda: float(next(joules))

    monkeypatch.setattr(benchmark.energy, "meter", meter)
    exp = tiny.mlp(MLP((16,), 3), batch_size=16)
    found = benchmark.run(exp, lambda text: None, seconds=0.05)
    measured = dict.fromkeys(p.setting for p in (*found.batches, *found.ladder[1:], *found.strong, *found.weak))
    assert metered == [setting.devices for setting in measured]
    names = [p.setting for p in found.ladder]
    assert names[:2] == [Setting("float32", 16, jit=False), Setting("float32", 16)] and names[-1].devices == 2
    assert [p.setting.batch_size for p in found.batches] == [4, 16, 61]  # of 61 examples no more than all
    assert [p.setting.devices for p in found.strong] == [1, 2] and found.serial_share is not None
    assert [p.setting.batch_size for p in found.weak] == [16, 32]
    assert found.ladder[1].ms < found.ladder[0].ms  # jit pays
    flops = 2 * (3 * (36 * 16 + 16 * 3) - 36 * 16)
    for p in (*found.batches, *found.strong):
        assert p.mfu == pytest.approx(p.examples_per_sec * flops / 1e11 / p.setting.devices)
        assert p.predicted and 0 < p.data <= 1 and p.joules > 0 and p.measured is None
        assert (p.collectives is None) == (p.setting.devices == 1)
    assert 0 < found.strong[1].collectives <= 1
    assert json.loads(json.dumps(benchmark.to_json(found)))["strong"][1]["setting"]["devices"] == 2
    benchmark.picture(found).savefig(tmp_path / "two.png")
    benchmark.picture(found._replace(devices=1)).savefig(tmp_path / "one.png")
    assert all((tmp_path / name).stat().st_size > 10**4 for name in ("one.png", "two.png"))

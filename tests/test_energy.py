"""What a run says of the hardware: share of peak, joules, kWh; absent where the chip doesn't tell."""

import json
import time
import types

import fake_nvml
import pytest
import tiny

from jaxcompute import log, train
from jaxcompute.compute import energy

WATTS = 250


def gpu(ordinal: int):
    return types.SimpleNamespace(platform="gpu", local_hardware_id=ordinal)


def counting(start: float = 0.0):
    """A GPU that draws WATTS."""
    began = time.perf_counter()
    return fake_nvml.H100 | {"TotalEnergyConsumption": lambda: 1000 * (start + WATTS * (time.perf_counter() - began))}


def test_joules_are_those_of_the_devices_that_compute(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fixed = [fake_nvml.H100 | {"TotalEnergyConsumption": 1000 * joules} for joules in (1, 20, 300)]
    with energy.meter([gpu(0), gpu(2)], fake_nvml.nvml(*fixed)) as joules:
        assert joules() == 301
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    with energy.meter([gpu(0)], fake_nvml.nvml(*fixed)) as joules:
        assert joules() == 300
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1932f9")  # as much of it as no other has
    with energy.meter([gpu(0)], fake_nvml.nvml(*fixed)) as joules:
        assert joules() == 20


def test_gpus_that_are_not_alike_are_counted_where_their_order_is_sure(monkeypatch):
    """CUDA numbers the fastest first, NVML by the bus."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    mixed = [fake_nvml.H100 | {"Name": "Tesla T4", "TotalEnergyConsumption": 1000}, fake_nvml.H100]

    def read():
        with energy.meter([gpu(0)], fake_nvml.nvml(*mixed)) as joules:
            return joules()

    assert read() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert read() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert read() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-")  # which may be either
    assert read() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert read() == 1


@pytest.mark.parametrize(
    "why", ["no driver", "no permission", "a chip that doesn't count", "on the CPU", "a share of a GPU"]
)
def test_where_no_one_counts_there_is_none(why, monkeypatch):
    if why == "a share of a GPU":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    closed = fake_nvml.nvml(fake_nvml.H100)
    closed.nvmlDeviceGetHandleByIndex = lambda index: fake_nvml.fail("Insufficient Permissions")
    silent = {name: value for name, value in fake_nvml.H100.items() if name != "TotalEnergyConsumption"}
    nvml = {
        "no driver": fake_nvml.nvml(error="Driver Not Loaded"),
        "no permission": closed,
        "a chip that doesn't count": fake_nvml.nvml(fake_nvml.H100, silent),
    }.get(why, fake_nvml.nvml(fake_nvml.H100, fake_nvml.H100))
    cpu = types.SimpleNamespace(platform="cpu", local_hardware_id=0)
    with energy.meter([cpu] if why == "on the CPU" else [gpu(0), gpu(1)], nvml) as joules:
        assert joules() is None


def test_a_run_logs_its_share_of_peak_and_its_energy(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    exp = tiny.mlp(mesh_data=1)
    before = {"state": "preempted", "started": "then", "kwh": 0.5}  # of a run that goes on
    log.write_json(tmp_path / "status.json", before)
    began = time.perf_counter()
    with energy.meter([gpu(0)], fake_nvml.nvml(counting(start=1e6))) as joules:
        instruments = train.Instruments(
            peak=lambda kind, precision: 1e9 if precision == "float32" else None, joules=joules
        )
        train.fit(exp, tmp_path, say=lambda text: None, instruments=instruments)
    most = WATTS * (time.perf_counter() - began) / 3.6e6
    flops = 2 * (3 * (36 * 16 + 16 * 3) - 36 * 16)  # an example
    for values in log.read(tmp_path).values():
        if "perf/mfu" not in values:
            continue
        rate = values["perf/examples_per_sec"]
        assert values["perf/mfu"] == pytest.approx(rate * flops / 1e9)
        assert values["perf/joules_per_example"] == pytest.approx(WATTS / rate, rel=0.2)
    assert sum("perf/mfu" in values for values in log.read(tmp_path).values()) == 3
    line = log.hardware(tmp_path)
    assert all(words in line for words in (" examples/s, ", " of peak, ", " waiting for data, ", " J an example, 0.5"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "done" and status["started"] == "then"
    assert 0.5 < status["kwh"] <= 0.5 + most


def test_without_instruments_the_figures_are_absent(tmp_path):
    train.fit(tiny.mlp(mesh_data=1), tmp_path, say=lambda text: None)
    tags = {tag for values in log.read(tmp_path).values() for tag in values}
    assert "perf/examples_per_sec" in tags
    assert not tags & {"perf/mfu", "perf/joules_per_example", "mem/peak_bytes"}
    assert log.hardware(tmp_path).endswith("waiting for data")
    assert "kwh" not in json.loads((tmp_path / "status.json").read_text())

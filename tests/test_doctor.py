"""Each row of doctor, seen failing once by a planted fault."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import fake_nvml
import jax
import numpy as np
import pynvml
import pytest

from jaxcompute.compute import ceilings, doctor, nvml, peaks
from jaxcompute.compute.ceilings import Ceilings

ROOT = Path(__file__).parents[1]
H100 = nvml.driver(fake_nvml.nvml(fake_nvml.H100))
HEALTHY = doctor.Facts(
    python="3.12.4",
    packages={
        "jax": "0.11.0",
        "jaxlib": "0.11.0",
        "flax": "0.12.8",
        "jax-cuda12-plugin": "0.11.0",
        "jax-cuda12-pjrt": "0.11.0",
        "nvidia-nccl-cu12": "2.27.3",
    },
    requirements={"jax": ("jaxlib<=0.11.0,>=0.11.0", "numpy>=2"), "jaxcompute": ("jax<0.13,>=0.10.2", "flax>=0.12")},
    environment={},
    jax_error=None,
    platform="gpu",
    devices=("NVIDIA H100 80GB HBM3",),
    cuda_error=None,
    bfloat16_broken=False,
    nan_hidden=False,
    libraries={"CUDA": (12080, 12080), "cuDNN": (90800, 90800)},
    pci_gpus=1,
    nvml_error=None,
    driver=H100,
    tensorflow=None,
    tensorflow_loaded=False,
    cache="/cache",
    cache_error=None,
    cache_hit=True,
    workdir="/runs",
    workdir_error=None,
    disk_free=10**12,
    write_speed=2e9,
    data_dir="/data",
    data_sets=("cifar10",),
    cpus=64,
    cpus_usable=16,
    numa_nodes=2,
    numa_own=(0,),
    shared_memory=2**33,
    ceilings=Ceilings(50e12, 400e12, 700e12, 500e12, 3000e9, 50e9, None),
    loaded=H100,
)


def gpu(**values):
    return H100._replace(gpus=(H100.gpus[0]._replace(**values),))


def without_gpu(**changes) -> doctor.Facts:
    packages = {name: version for name, version in HEALTHY.packages.items() if "cuda" not in name}
    facts = {"platform": "cpu", "devices": ("cpu",), "pci_gpus": 0, "driver": None, "loaded": None, "libraries": {}}
    facts |= {"packages": packages, "nvml_error": "NVML Shared Library Not Found"}
    return dataclasses.replace(HEALTHY, **(facts | changes))


def planted(**changes) -> doctor.Facts:
    return dataclasses.replace(HEALTHY, **changes)


# (facts, row, verdict, words that its line and mend must have)
FAULTS = {
    "old python": (planted(python="3.10.2"), "python", "fail", ["3.10.2", "3.11"]),
    "wrong jaxlib": (
        planted(packages=HEALTHY.packages | {"jaxlib": "0.10.1"}),
        "packages",
        "fail",
        ["jax needs jaxlib<=0.11.0", "0.10.1", "pip install"],
    ),
    "jax too new": (
        planted(packages=HEALTHY.packages | {"jax": "0.14.0"}),
        "packages",
        "fail",
        ["jaxcompute needs jax"],
    ),
    "flax missing": (
        planted(packages={name: v for name, v in HEALTHY.packages.items() if name != "flax"}),
        "packages",
        "fail",
        ["flax is missing"],
    ),
    "plugin of another jaxlib": (
        planted(packages=HEALTHY.packages | {"jax-cuda12-plugin": "0.10.0"}),
        "CUDA plugin",
        "fail",
        ["0.10.0", "jaxlib 0.11.0", "'jax[cuda12]==0.11.0'"],
    ),
    "both plugins": (
        planted(packages=HEALTHY.packages | {"jax-cuda13-plugin": "0.11.0"}),
        "CUDA plugin",
        "fail",
        ["exclude each other", "pip uninstall"],
    ),
    "no plugin": (
        without_gpu(pci_gpus=1, driver=H100, nvml_error=None),
        "CUDA plugin",
        "fail",
        ["on the CPU", "pip install -e '.[cuda12]'"],
    ),
    "missing driver": (
        planted(driver=None, loaded=None, nvml_error="Driver Not Loaded"),
        "driver",
        "fail",
        ["Driver Not Loaded", "install or reload"],
    ),
    "old driver": (
        planted(packages=HEALTHY.packages | {"jax-cuda12-plugin": "0.11.0"}, driver=H100._replace(cuda=(11, 8))),
        "driver",
        "fail",
        ["CUDA 11.8", "525.60.13"],
    ),
    "pynvml missing": (planted(driver=None, nvml_error="pynvml is not installed"), "driver", "warn", ["nvidia-ml-py"]),
    "old cuDNN": (
        planted(libraries={"CUDA": (12080, 12080), "cuDNN": (90100, 90800)}),
        "CUDA libraries",
        "fail",
        ["cuDNN 9.1.0 is older than 9.8.0"],
    ),
    "another CUDA in the way": (
        planted(environment={"LD_LIBRARY_PATH": "/usr/local/cuda/lib64"}),
        "CUDA libraries",
        "warn",
        ["unset LD_LIBRARY_PATH"],
    ),
    "silently on the CPU": (
        planted(platform="cpu", devices=("cpu",), cuda_error="cuInit failed"),
        "devices",
        "fail",
        ["fell back to the CPU", "cuInit failed"],
    ),
    "hidden by JAX_PLATFORMS": (
        planted(platform="cpu", devices=("cpu",), environment={"JAX_PLATFORMS": "cpu"}),
        "devices",
        "warn",
        ["unset JAX_PLATFORMS"],
    ),
    "hidden by CUDA": (
        planted(platform="cpu", devices=("cpu",), environment={"CUDA_VISIBLE_DEVICES": ""}),
        "devices",
        "warn",
        ["unset CUDA_VISIBLE_DEVICES"],
    ),
    "one of two seen": (
        planted(driver=H100._replace(gpus=H100.gpus * 2)),
        "devices",
        "warn",
        ["1 x NVIDIA H100", "of 2"],
    ),
    "jax is broken": (planted(jax_error="jaxlib is too old"), "devices", "fail", ["jaxlib is too old"]),
    "broken bfloat16": (without_gpu(bfloat16_broken=True), "bfloat16", "warn", ["NaN", "XLA_FLAGS=--xla_cpu"]),
    "hidden NaN": (without_gpu(nan_hidden=True), "NaN", "warn", ["hide", "-reduce"]),
    "hidden NaN, broken bfloat16": (
        without_gpu(nan_hidden=True, bfloat16_broken=True),
        "NaN",
        "warn",
        ["fusion_type=  (steps"],
    ),
    "TensorFlow installed": (planted(tensorflow="2.19"), "TensorFlow", "warn", ["2.19", "pip uninstall"]),
    "TensorFlow loaded": (
        planted(tensorflow="2.19", tensorflow_loaded=True),
        "TensorFlow",
        "fail",
        ["loaded", "set_visible_devices"],
    ),
    "GPU taken": (
        planted(driver=gpu(memory_free=10**9, others=1)),
        "GPU memory",
        "warn",
        ["1 GB are free", "1 other process", "nvidia-smi"],
    ),
    "others, and less than the share free": (
        planted(
            driver=gpu(memory_free=int(0.9 * gpu().gpus[0].memory)), environment={"XLA_CLIENT_MEM_FRACTION": ".95"}
        ),
        "GPU memory",
        "warn",
        ["JAX takes 95%", "are free"],
    ),
    "no share": (
        planted(environment={"XLA_PYTHON_CLIENT_MEM_FRACTION": "90%"}),
        "GPU memory",
        "fail",
        ["'90%' is no share", "unset XLA_CLIENT_MEM_FRACTION"],
    ),
    "slow allocator": (
        planted(environment={"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}),
        "GPU memory",
        "warn",
        ["unset XLA_PYTHON_CLIENT_ALLOCATOR"],
    ),
    "too hot": (
        planted(loaded=gpu(throttled_by=("heat (hardware)",), temperature=94)),
        "clocks",
        "warn",
        ["94", "cool"],
    ),
    "power capped": (
        planted(loaded=gpu(power_cap=300.0)),
        "clocks",
        "warn",
        ["300 of 700 W", "nvidia-smi -i 0 -pl 700"],
    ),
    "half a slot": (planted(loaded=gpu(link_width=(4, 16))), "clocks", "warn", ["4 of 16 PCIe lanes"]),
    "no jit": (planted(environment={"JAX_DISABLE_JIT": "1"}), "settings", "warn", ["unset JAX_DISABLE_JIT"]),
    "many CPU devices": (
        planted(environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}),
        "settings",
        "warn",
        ["unset XLA_FLAGS"],
    ),
    "unwritable cache": (
        planted(cache_error="Permission denied"),
        "compile cache",
        "fail",
        ["Permission denied", "JAX_COMPILATION_CACHE_DIR"],
    ),
    "cache never hit": (planted(cache_hit=False), "compile cache", "warn", ["not found again"]),
    "disk full": (planted(disk_free=10**8), "work directory", "fail", ["100 MB free", "make room"]),
    "disk nearly full": (planted(disk_free=5 * 10**9), "work directory", "warn", ["5 GB free"]),
    "slow disk": (planted(write_speed=5e6), "work directory", "warn", ["5 MB/s", "local disk"]),
    "unwritable work directory": (
        planted(workdir_error="Read-only file system"),
        "work directory",
        "fail",
        ["Read-only"],
    ),
    "data directory mistyped": (
        planted(data_sets=None, environment={"JAXCOMPUTE_DATA_DIR": "/data"}),
        "data",
        "warn",
        ["/data is not there", "--data_dir"],
    ),
    "too few processors": (planted(cpus_usable=2), "host", "warn", ["2 of 64 CPUs", "--cpus-per-task"]),
    "far from the GPU": (planted(driver=gpu(numa_node=1)), "host", "warn", ["GPU is on 1", "numactl --cpunodebind=1"]),
    "docker's shared memory": (planted(shared_memory=2**26), "host", "warn", ["67.1 MB", "--shm-size"]),
    "slow matmul": (
        planted(ceilings=HEALTHY.ceilings._replace(bfloat16=200e12)),
        "matmul",
        "warn",
        ["bfloat16 200 TFLOP/s (20% of peak)", "below the datasheet"],
    ),
    "slow memory": (planted(ceilings=HEALTHY.ceilings._replace(bandwidth=1e12)), "memory", "warn", ["30% of peak"]),
    "slow bus": (planted(ceilings=HEALTHY.ceilings._replace(host_to_device=1e9)), "host to device", "warn", ["1 GB/s"]),
    "slow all-reduce": (
        planted(devices=HEALTHY.devices * 2, ceilings=HEALTHY.ceilings._replace(all_reduce=1e9)),
        "all-reduce",
        "warn",
        ["over 2 devices", "NCCL_DEBUG"],
    ),
    "nothing to measure": (planted(jax_error="broken", ceilings=None), "measurement", "fail", ["jax did not start"]),
    "no room to measure": (
        planted(ceilings=None, unmeasured="RESOURCE_EXHAUSTED: 1 GiB"),
        "measurement",
        "fail",
        ["RESOURCE_EXHAUSTED: 1 GiB", "nvidia-smi"],
    ),
}


def judged(facts: doctor.Facts) -> dict[str, doctor.Check]:
    measured = doctor.MEASURED if facts.ceilings else doctor.UNMEASURED
    return {check.name: check for check in [row(facts) for row in (*doctor.SEEN, *measured)]}


@pytest.mark.parametrize("facts", [HEALTHY, without_gpu()], ids=["an H100", "no GPU"])
def test_a_healthy_machine_passes(facts):
    wrong = [check for check in judged(facts).values() if check.verdict != "pass" or check.mend]
    assert not wrong, doctor.page(wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_with_its_mend(fault):
    facts, row, verdict, words = FAULTS[fault]
    check = judged(facts)[row]
    assert (check.verdict, bool(check.mend)) == (verdict, True)
    for word in words:
        assert word in f"{check.seen} {check.mend}"


def test_every_row_has_been_seen_to_fail():
    rows = {row for _, row, _, _ in FAULTS.values()}
    assert rows == {*judged(HEALTHY), "measurement"} - {"convolution"}  # which no datasheet tells


def test_a_device_that_another_process_holds_is_told_and_the_page_goes_on(monkeypatch, capsys):
    def spent(seconds):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.00GiB")

    monkeypatch.setattr(doctor, "gather", lambda *args: planted(ceilings=None))
    monkeypatch.setattr(ceilings, "measure", spent)
    assert doctor.run("/cache", Path("/runs"), Path("/data"), as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    *_, measurement, clocks = report["checks"]
    assert measurement["name"] == "measurement" and "allocate 1.00GiB" in measurement["seen"]
    assert clocks["name"] == "clocks" and report["measured"] is None


def test_a_cache_that_is_a_url_is_not_made_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = doctor.gather(cache="gs://bucket/cache", workdir=tmp_path, data_dir=tmp_path)
    assert facts.cache == "gs://bucket/cache" and facts.cache_error is None
    assert list(tmp_path.iterdir()) == []


def test_rows_that_need_a_gpu_say_so_where_there_is_none():
    silent = {"CUDA plugin", "driver", "CUDA libraries", "GPU memory", "clocks"}
    assert {name for name, check in judged(without_gpu()).items() if check.seen == doctor.NO_GPU} == silent


def test_a_hidden_nan_is_seen_and_the_mend_mends():
    with jax.debug_nans(True):
        assert doctor._hides_nan(jax) or jax.__version__ != "0.10.2"
    flag = doctor.check_nan(without_gpu(nan_hidden=True)).mend.split()[0].removeprefix("XLA_FLAGS=")
    program = "import jax; from jaxcompute.compute import doctor; assert not doctor._hides_nan(jax)"
    env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


def test_gathering_sees_faults_that_are_really_there(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "tensorflow.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**8))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml.nvml(error="Driver Not Loaded"))
    facts = doctor.gather(cache=str(file / "cache"), workdir=file / "runs", data_dir=tmp_path / "nowhere")
    assert facts.cache_error and not facts.cache_hit
    assert facts.disk_free == 10**8 and facts.workdir == str(tmp_path)
    assert facts.tensorflow == "of unknown version" and not facts.tensorflow_loaded
    assert facts.nvml_error == "Driver Not Loaded" and facts.driver is None
    assert facts.data_sets is None
    assert facts.platform == "cpu" and facts.cuda_error
    rows = judged(dataclasses.replace(facts, ceilings=HEALTHY.ceilings))
    assert [rows[name].verdict for name in ("compile cache", "work directory", "packages")] == ["fail", "fail", "pass"]


def test_the_driver_is_asked_for_what_it_tells(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hot = fake_nvml.H100 | {"CurrentClocksEventReasons": 0x40 | 0x04, "Temperature": 93}
    silent = {"Name": "an old chip"}
    told = nvml.driver(fake_nvml.nvml(hot, silent, driver="535.1", cuda=12020))
    assert told.cuda == (12, 2) and told.version == "535.1"
    assert told.gpus[0].throttled_by == ("heat (hardware)",) and told.gpus[0].power_cap == 700
    assert told.gpus[1].clock is None and told.gpus[1].link_width is None
    with pytest.raises(nvml.Missing, match="Not Loaded"):
        nvml.driver(fake_nvml.nvml(error="Driver Not Loaded"))


def test_the_fake_driver_has_only_what_the_real_one_has():
    assert {name for name in vars(fake_nvml.nvml()) if not hasattr(pynvml, name)} == set()


def test_what_the_ceilings_multiply_is_drawn_at_random(monkeypatch):
    """On constants a GPU draws less power and clocks higher than on anything that is trained on."""
    multiplied = []
    monkeypatch.setattr(ceilings, "best", lambda call, *operands, seconds: multiplied.extend(operands) or 1.0)
    ceilings.measure(devices=jax.devices()[:1])
    assert len(multiplied) == 6  # of float32, bfloat16 and a convolution
    for operand in multiplied:
        assert 0.9 < np.std(np.asarray(operand, np.float32)) < 1.1


def test_every_chip_of_the_table_is_sound():
    for name, chip in peaks.CHIPS.items():
        assert chip.source and chip.float32 <= (chip.tensorfloat32 or chip.float32), name
        assert 3e11 <= chip.bandwidth <= 1e13 and 8e12 <= chip.float32 <= 1.1e14, name
        assert chip.bfloat16 is None or 1.9 <= chip.bfloat16 / chip.tensorfloat32 <= 2.1, name
    assert peaks.flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peaks.flops("NVIDIA H100 80GB HBM3", "float32") == 494.7e12  # XLA takes TF32 by default
    assert peaks.flops("Tesla T4", "bfloat16") == 8.1e12  # widened to float32
    assert peaks.flops("cpu", "float32") is None


def test_doctor_runs_in_15_seconds_and_its_exit_code_is_its_verdict(tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), "--mode=doctor", "--json", f"--workdir={tmp_path / 'runs'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    seconds = time.perf_counter() - began
    report = json.loads(ended.stdout)
    assert ended.returncode == (report["verdict"] == "fail"), ended.stderr
    assert [check["name"] for check in report["checks"]] == [*judged(HEALTHY)]
    assert report["measured"]["float32"] > 1e9 and report["measured"]["tensorfloat32"] is None
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"
    assert seconds < 60  # 15 on a machine that does nothing else

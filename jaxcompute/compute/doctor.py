"""Is this machine fit to train? A page of checks, each with the line that mends it, and some seconds of measurement.

`gather` looks and judges nothing; a check is a pure function from what it saw to a verdict. So a fault is planted in a
test by giving other facts, and doctor works where jax itself can't be imported.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from jaxcompute.compute import nvml, peaks
from jaxcompute.errors import line_of
from jaxcompute.log import quantity

Verdict = Literal["pass", "warn", "fail"]
MARKS = {"pass": "\x1b[32mpass\x1b[0m", "warn": "\x1b[33mwarn\x1b[0m", "fail": "\x1b[31mfail\x1b[0m"}
NO_GPU = "no NVIDIA GPU in this machine: nothing to check"
FUSIONS = "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type="  # which, of what XLA:CPU gives its library
INSTALL = "pip install -e '.[cuda12]'  (or cuda13; not both)"
# oldest driver that runs a CUDA major version (CUDA Toolkit release notes, table 2)
OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "JAX_PLATFORMS",
    "JAXCOMPUTE_DATA_DIR",
    "JAX_DISABLE_JIT",
    "JAX_DEBUG_NANS",
    "JAX_ENABLE_CHECKS",
    "LD_LIBRARY_PATH",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


class Check(NamedTuple):
    name: str
    verdict: Verdict
    seen: str
    mend: str = ""  # a command or a setting; empty where there is nothing to mend


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was seen of the machine. None: couldn't be told."""

    python: str
    packages: Mapping[str, str]  # installed distribution -> version, of those that matter
    requirements: Mapping[str, tuple[str, ...]]  # distribution -> what it asks for
    environment: Mapping[str, str]
    # jax
    jax_error: str | None  # why jax or every backend of it did not start
    platform: str | None
    devices: tuple[str, ...]  # kinds
    cuda_error: str | None  # why there is no CUDA backend
    bfloat16_broken: bool  # by this jaxlib on this CPU
    nan_hidden: bool | None  # by what XLA makes of a ReLU and a sum
    libraries: Mapping[str, tuple[int, int]]  # CUDA library -> (version in use, version the plugin was built with)
    # the driver
    pci_gpus: int  # NVIDIA display controllers on the PCI bus, or device files of the driver
    nvml_error: str | None
    driver: nvml.Driver | None
    tensorflow: str | None  # version, where it can be imported
    tensorflow_loaded: bool
    # places
    cache: str
    cache_error: str | None
    cache_hit: bool
    workdir: str
    workdir_error: str | None
    disk_free: int  # bytes
    write_speed: float | None  # bytes/s to the disk
    data_dir: str
    data_sets: tuple[str, ...] | None  # prepared in it; None: there is no such folder
    # the host
    cpus: int  # in the machine
    cpus_usable: float  # by affinity and the container's quota
    numa_nodes: int
    numa_own: tuple[int, ...]  # nodes of the processors this process may use
    shared_memory: int | None  # bytes free
    # measured
    ceilings: Any = None  # ceilings.Ceilings, where jax started and had room
    unmeasured: str | None = None  # why it had none
    loaded: nvml.Driver | None = None  # just after the load


# -- checks: pure ------------------------------------------------------------------------------------------------------


def check_python(facts: Facts) -> Check:
    if Version(facts.python) < Version("3.11"):
        return Check("python", "fail", f"{facts.python}, and jaxcompute needs 3.11", "python3.12 -m venv .venv")
    return Check("python", "pass", facts.python)


def check_packages(facts: Facts) -> Check:
    """Every requirement between the packages that matter: jaxlib's version by jax, all of them by jaxcompute."""
    wrong = []
    for owner, asked in facts.requirements.items():
        for text in asked:
            need = Requirement(text)
            found = facts.packages.get(canonicalize_name(need.name))
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            if found is None and owner == "jaxcompute":
                wrong.append(f"{need.name} is missing")
            elif found is not None and not need.specifier.contains(found, prereleases=True):
                wrong.append(f"{owner} needs {need.name}{need.specifier} and there is {found}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "pip install -e .  (in a new virtual environment)")
    shown = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return Check("packages", "pass", "  ".join(f"{n} {facts.packages[n]}" for n in shown if n in facts.packages))


def check_plugin(facts: Facts) -> Check:
    """The CUDA plugin is built for one jaxlib."""
    plugins = {name: v for name, v in facts.packages.items() if name.startswith(("jax-cuda12-", "jax-cuda13-"))}
    majors = {name[8:10] for name in plugins}
    jaxlib = facts.packages.get("jaxlib", "0")
    if len(majors) > 1:
        mend = "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt jax-cuda13-plugin jax-cuda13-pjrt; " + INSTALL
        return Check("CUDA plugin", "fail", "cuda12 and cuda13 are both installed, and exclude each other", mend)
    if not plugins:
        if facts.pci_gpus:
            return Check("CUDA plugin", "fail", "not installed, so JAX computes on the CPU", INSTALL)
        return Check("CUDA plugin", "pass", NO_GPU)
    other = [f"{name} {version}" for name, version in plugins.items() if Version(version) != Version(jaxlib)]
    if other:
        mend = f"pip install -U 'jax[cuda{majors.pop()}]=={jaxlib}' jaxlib=={jaxlib}"
        return Check("CUDA plugin", "fail", f"{', '.join(other)} beside jaxlib {jaxlib}", mend)
    return Check("CUDA plugin", "pass", "  ".join(f"{name} {version}" for name, version in plugins.items()))


def check_driver(facts: Facts) -> Check:
    if facts.driver is None:
        if not facts.pci_gpus:
            return Check("driver", "pass", NO_GPU)
        if "pynvml" in (facts.nvml_error or ""):
            return Check("driver", "warn", "can't be asked: pynvml is missing", "pip install nvidia-ml-py")
        seen = f"there is an NVIDIA GPU, and its driver doesn't answer: {facts.nvml_error}"
        return Check(
            "driver", "fail", seen, "install or reload the NVIDIA driver; in a container: docker run --gpus all"
        )
    version, cuda = facts.driver.version, facts.driver.cuda
    major = next((int(name[8:10]) for name in facts.packages if name.startswith(("jax-cuda12-", "jax-cuda13-"))), 12)
    seen = f"{version}, runs CUDA {cuda[0]}.{cuda[1]}"
    if cuda[0] < major:
        old = f"install driver {OLDEST_DRIVER.get(major, '')} or newer, or pip install 'jax[cuda{cuda[0]}]'"
        return Check("driver", "fail", f"{seen}; the CUDA plugin needs CUDA {major}", old)
    return Check("driver", "pass", seen)


def check_libraries(facts: Facts) -> Check:
    """cuDNN, NCCL and the rest must not be older than those the plugin was built with."""
    if not facts.libraries:
        return Check("CUDA libraries", "pass", NO_GPU if not facts.pci_gpus else "not told: no CUDA plugin")
    old = [
        f"{name} {_dotted(name, found)} is older than {_dotted(name, built)}, which the plugin was built with"
        for name, (found, built) in facts.libraries.items()
        if found < built
    ]
    nccl = next((version for name, version in facts.packages.items() if name.startswith("nvidia-nccl")), None)
    seen = "  ".join(f"{name} {_dotted(name, found)}" for name, (found, _) in facts.libraries.items())
    seen += f"  NCCL {nccl}" if nccl else "  no NCCL"
    path = facts.environment.get("LD_LIBRARY_PATH", "")
    if old:
        mend = "unset LD_LIBRARY_PATH" if "cuda" in path or "cudnn" in path else f"pip install -U {INSTALL[12:]}"
        return Check("CUDA libraries", "fail", "; ".join(old), mend)
    if "cuda" in path or "cudnn" in path:
        seen += f"  LD_LIBRARY_PATH={path}"
        return Check("CUDA libraries", "warn", seen, "unset LD_LIBRARY_PATH: its libraries hide those of pip")
    return Check("CUDA libraries", "pass", seen)


def _dotted(name: str, version: int) -> str:
    """12080 of CUDA is 12.8, 90800 of cuDNN is 9.8.0."""
    if name == "CUDA":
        return f"{version // 1000}.{version % 1000 // 10}"
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def check_gpu(facts: Facts) -> Check:
    """Does JAX compute on the GPU, or has it gone to the CPU without a word?"""
    there = len(facts.driver.gpus) if facts.driver else facts.pci_gpus
    if facts.jax_error:
        return Check(
            "devices", "fail", f"jax doesn't start: {facts.jax_error}", "see the rows above; else pip install -e ."
        )
    seen = f"{len(facts.devices)} x {facts.devices[0]}" if facts.devices else "none"
    if facts.platform == "gpu" or not there:
        if there > len(facts.devices) and facts.platform == "gpu":
            return Check("devices", "warn", f"{seen} of {there} in the machine", "unset CUDA_VISIBLE_DEVICES")
        return Check("devices", "pass", seen if facts.platform == "gpu" else f"{seen}; {NO_GPU.partition(':')[0]}")
    platforms, visible = facts.environment.get("JAX_PLATFORMS"), facts.environment.get("CUDA_VISIBLE_DEVICES")
    if platforms and "cuda" not in platforms and "gpu" not in platforms:
        return Check("devices", "warn", f"JAX_PLATFORMS={platforms} hides {there} GPU(s)", "unset JAX_PLATFORMS")
    if visible is not None and not visible.strip("-1 "):
        seen = f"CUDA_VISIBLE_DEVICES={visible!r} hides {there} GPU(s)"
        return Check("devices", "warn", seen, "unset CUDA_VISIBLE_DEVICES")
    why = f": {facts.cuda_error}" if facts.cuda_error else ""
    plugin = any(name.startswith("jax-cuda") for name in facts.packages)
    mend = "mend the driver and CUDA rows of this page" if plugin else INSTALL
    return Check("devices", "fail", f"{there} GPU(s) in the machine, and JAX fell back to the CPU{why}", mend)


def check_bfloat16(facts: Facts) -> Check:
    if facts.bfloat16_broken:
        seen = f"broken on the CPU in jaxlib {facts.packages.get('jaxlib')}: residual blocks give NaN or garbage"
        return Check("bfloat16", "warn", seen, f"{FUSIONS}  (or float32)")
    return Check("bfloat16", "pass", "sound")


def check_nan(facts: Facts) -> Check:
    """In training one shows in the gradient of each kernel whose input it reached; in an evaluation there is none."""
    if facts.nan_hidden:
        seen = "a ReLU and a sum, jitted, turn it into 0: an evaluation may hide one"
        types = "" if facts.bfloat16_broken else "-reduce"  # one flag mends both
        return Check("NaN", "warn", seen, f"{FUSIONS}{types}  (steps take longer)")
    return Check("NaN", "pass", "not tried" if facts.nan_hidden is None else "kept by a ReLU and a sum")


def check_tensorflow(facts: Facts) -> Check:
    """TensorFlow takes all of a GPU's memory at its first use, and JAX then finds none."""
    if facts.tensorflow is None:
        return Check("TensorFlow", "pass", "not installed: nothing else takes the GPU")
    seen = f"TensorFlow {facts.tensorflow}"
    if not facts.pci_gpus and not facts.driver:
        return Check("TensorFlow", "pass", f"{seen}; {NO_GPU.partition(':')[0]} that it could take")
    mend = "pip uninstall -y tensorflow  (jaxcompute doesn't need it); or tf.config.set_visible_devices([], 'GPU')"
    if facts.tensorflow_loaded:
        return Check(
            "TensorFlow", "fail", f"{seen} is loaded beside JAX and takes the GPU's memory at its first use", mend
        )
    return Check("TensorFlow", "warn", f"{seen} is installed, and takes the whole GPU where anything imports it", mend)


def check_memory(facts: Facts) -> Check:
    """Preallocation: JAX takes a share of the GPU's memory at its start."""
    if not facts.driver or not facts.driver.gpus:
        return Check("GPU memory", "pass", NO_GPU if not facts.pci_gpus else "not told: no driver")
    environment = facts.environment
    gpu = facts.driver.gpus[0]
    others = sum(gpu.others for gpu in facts.driver.gpus)
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older
    given = next(filter(None, map(environment.get, names)), "0.75")
    try:
        share = float(given)
    except ValueError:
        return Check("GPU memory", "fail", f"{given!r} is no share of the memory", f"unset {' '.join(names)}")
    ahead = environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    seen = f"{quantity(gpu.memory, 'B')}, of which JAX takes {share:.0%} " + (
        "at its start" if ahead else "as it needs it"
    )
    if environment.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform":
        return Check("GPU memory", "warn", f"{seen}, by the slow allocator", "unset XLA_PYTHON_CLIENT_ALLOCATOR")
    if gpu.memory_free is not None and gpu.memory_free < share * gpu.memory and (others or ahead):
        seen = f"{seen}; {quantity(gpu.memory_free, 'B')} are free, {others} other process(es) compute there"
        return Check("GPU memory", "warn", seen, "end them (nvidia-smi lists them), or CUDA_VISIBLE_DEVICES=another")
    return Check("GPU memory", "pass", f"{seen}" + (f"; {others} other process(es) there" if others else ""))


def check_clocks(facts: Facts) -> Check:
    """Clocks, power cap, heat, the bus, just after the load: why a GPU may be slower than its datasheet."""
    driver = facts.loaded or facts.driver
    if not driver or not driver.gpus:
        return Check("clocks", "pass", NO_GPU if not facts.pci_gpus else "not told: no driver")
    slow, mend = [], ""
    for number, gpu in enumerate(driver.gpus):
        if gpu.throttled_by:
            slow.append(f"GPU {number} is held back by {', '.join(gpu.throttled_by)} at {gpu.temperature} °C")
            mend = "cool it, or see nvidia-smi -q -d PERFORMANCE"
        if gpu.power_cap and gpu.power_default and gpu.power_cap < 0.99 * gpu.power_default:
            slow.append(f"GPU {number} is capped at {gpu.power_cap:.0f} of {gpu.power_default:.0f} W")
            mend = mend or f"sudo nvidia-smi -i {number} -pl {gpu.power_default:.0f}"
        if gpu.link_width and gpu.link_width[0] < gpu.link_width[1]:
            slow.append(f"GPU {number} has {gpu.link_width[0]} of {gpu.link_width[1]} PCIe lanes")
            mend = mend or "reseat the card, or move it to a full slot"
    if slow:
        return Check("clocks", "warn", "; ".join(slow), mend)
    gpu = driver.gpus[0]
    parts = [
        f"{gpu.clock} of {gpu.clock_max} MHz" if gpu.clock and gpu.clock_max else "",
        f"{gpu.power_cap:.0f} W cap" if gpu.power_cap else "",
        f"{gpu.temperature} °C" if gpu.temperature is not None else "",
    ]
    return Check("clocks", "pass", ", ".join(filter(None, parts)) or "not told by this chip")


def check_settings(facts: Facts) -> Check:
    switches = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_CHECKS")
    slow = [name for name in switches if facts.environment.get(name, "").lower() in ("1", "true", "yes", "on")]
    if slow:
        return Check("settings", "warn", f"{', '.join(slow)} set: many times slower", f"unset {' '.join(slow)}")
    flags = facts.environment.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" in flags and facts.platform == "gpu":
        return Check("settings", "warn", f"XLA_FLAGS={flags} splits the CPU into many devices", "unset XLA_FLAGS")
    return Check("settings", "pass", f"XLA_FLAGS={flags}" if flags else "none that slow JAX down")


def check_cache(facts: Facts) -> Check:
    if facts.cache_error:
        seen = f"{facts.cache}: {facts.cache_error}; each start compiles anew"
        return Check("compile cache", "fail", seen, "JAX_COMPILATION_CACHE_DIR=a folder that can be written")
    if not facts.cache_hit:
        seen = f"{facts.cache}: what was compiled is not found again"
        return Check("compile cache", "warn", seen, "unset JAX_ENABLE_COMPILATION_CACHE, or take an empty folder")
    return Check("compile cache", "pass", f"{facts.cache}: written, and hit")


def check_disk(facts: Facts) -> Check:
    mend = "make room, or --workdir=a folder on another disk"
    if facts.workdir_error:
        return Check("work directory", "fail", f"{facts.workdir}: {facts.workdir_error}", mend)
    speed = f", {quantity(facts.write_speed, 'B/s')} written" if facts.write_speed else ""
    seen = f"{facts.workdir}: {quantity(facts.disk_free, 'B')} free{speed}"
    if facts.disk_free < 1e9:
        return Check("work directory", "fail", seen, mend)
    if facts.disk_free < 10e9:
        return Check("work directory", "warn", seen, mend)
    if facts.write_speed and facts.write_speed < 50e6:
        return Check(
            "work directory", "warn", f"{seen}: checkpoints will be slow", "--workdir=a folder on a local disk"
        )
    return Check("work directory", "pass", seen)


def check_data(facts: Facts) -> Check:
    if facts.data_sets is None and "JAXCOMPUTE_DATA_DIR" in facts.environment:
        mend = "--data_dir=DIR, or JAXCOMPUTE_DATA_DIR: a folder that is there"
        return Check("data", "warn", f"{facts.data_dir} is not there", mend)
    seen = "made at the first download" if facts.data_sets is None else ", ".join(facts.data_sets) or "nothing prepared"
    return Check("data", "pass", f"{facts.data_dir}: {seen}")


def check_host(facts: Facts) -> Check:
    """Processors for the loader's workers, and whether they are near the GPU."""
    seen = f"{facts.cpus_usable:g} of {facts.cpus} CPUs, {facts.numa_nodes} NUMA node(s)"
    gpus = len(facts.devices) if facts.platform == "gpu" else 0
    if gpus and facts.cpus_usable < 4 * gpus:
        mend = "give the job more CPUs (Slurm: --cpus-per-task), or keep the data in memory"
        return Check("host", "warn", f"{seen} for {gpus} GPU(s): too few for workers that decode images", mend)
    nodes = [gpu.numa_node for gpu in facts.driver.gpus] if facts.driver else []
    far = [node for node in nodes if node is not None and node not in facts.numa_own]
    if gpus and far and len(far) == len(nodes):
        own = ", ".join(map(str, facts.numa_own))
        seen = f"{seen}; this process runs on node(s) {own}, and the GPU is on {far[0]}"
        mend = f"numactl --cpunodebind={far[0]} --membind={far[0]} python launch.py ..."
        return Check("host", "warn", seen, mend)
    if facts.shared_memory is not None and facts.shared_memory < 2**28:
        seen = f"{seen}; {quantity(facts.shared_memory, 'B')} of shared memory: too little for loader workers"
        return Check("host", "warn", seen, "docker run --shm-size=8g")
    return Check("host", "pass", seen)


def check_measured(facts: Facts) -> Check:
    """In place of those below, where nothing was measured."""
    if facts.jax_error:
        return Check("measurement", "fail", "nothing was measured: jax did not start", "mend the rows above")
    mend = "end what else uses the device (nvidia-smi lists it), or take another by CUDA_VISIBLE_DEVICES"
    return Check("measurement", "fail", f"nothing was measured: {facts.unmeasured}", mend)


def check_matmul(facts: Facts) -> Check:
    chip = peaks.chip(facts.devices[0])
    parts, low = [], False
    for name in ("float32", "tensorfloat32", "bfloat16"):
        rate, peak = getattr(facts.ceilings, name), chip and getattr(chip, name)
        if rate is not None:
            parts.append(f"{name} {_rate(rate, 'FLOP/s', peak)}")
            low |= peak is not None and rate < 0.4 * peak
    if facts.ceilings.tensorfloat32 is None:
        parts.append("tensorfloat32 needs a GPU")
    return _measured("matmul", "  ".join(parts), low)


def check_convolution(facts: Facts) -> Check:
    kind = "bfloat16" if facts.platform == "gpu" else "float32"
    return _measured(
        "convolution", f"3x3, 64 channels, {kind}: {_rate(facts.ceilings.convolution, 'FLOP/s', None)}", False
    )


def check_bandwidth(facts: Facts) -> Check:
    chip = peaks.chip(facts.devices[0])
    rate, peak = facts.ceilings.bandwidth, chip and chip.bandwidth
    return _measured("memory", f"{_rate(rate, 'B/s', peak)} read and written", peak is not None and rate < 0.5 * peak)


def check_transfer(facts: Facts) -> Check:
    rate = facts.ceilings.host_to_device
    if facts.platform == "gpu" and rate < 2e9:
        mend = "see nvidia-smi -q -d PCIE for the link's width; on many sockets numactl --cpunodebind"
        return Check("host to device", "warn", f"{_rate(rate, 'B/s', None)}: slow for a GPU", mend)
    return Check("host to device", "pass", _rate(rate, "B/s", None))


def check_all_reduce(facts: Facts) -> Check:
    if facts.ceilings.all_reduce is None:
        return Check("all-reduce", "pass", "one device: nothing to reduce")
    seen = f"{_rate(facts.ceilings.all_reduce, 'B/s', None)} a device, over {len(facts.devices)} devices"
    if facts.platform == "gpu" and facts.ceilings.all_reduce < 2e9:
        return Check(
            "all-reduce", "warn", f"{seen}: slow", "NCCL_DEBUG=INFO says which way it takes; nvidia-smi topo -m"
        )
    return Check("all-reduce", "pass", seen)


def _measured(name: str, seen: str, low: bool) -> Check:
    if low:
        mend = "look at the clocks row, at nvidia-smi for other processes, and at the power cap"
        return Check(name, "warn", f"{seen}: far below the datasheet", mend)
    return Check(name, "pass", seen)


def _rate(rate: float, unit: str, peak: float | None) -> str:
    return quantity(rate, unit) + (f" ({rate / peak:.0%} of peak)" if peak else "")


SEEN: tuple[Callable[[Facts], Check], ...] = (
    check_python,
    check_packages,
    check_plugin,
    check_driver,
    check_libraries,
    check_gpu,
    check_bfloat16,
    check_nan,
    check_tensorflow,
    check_memory,
    check_settings,
    check_cache,
    check_disk,
    check_data,
    check_host,
)
MEASURED: tuple[Callable[[Facts], Check], ...] = (
    check_matmul,
    check_convolution,
    check_bandwidth,
    check_transfer,
    check_all_reduce,
    check_clocks,
)
UNMEASURED: tuple[Callable[[Facts], Check], ...] = (check_measured, check_clocks)


# -- gathering ---------------------------------------------------------------------------------------------------------


def gather(cache: str, workdir: Path, data_dir: Path) -> Facts:
    """Look at the machine. Changes nothing but files in the compile cache; what it writes to measure it takes away.

    Args:
        cache: of compiled programs; a folder, or a URL, which is only shown.
        workdir: where runs will be left; need not be there.
        data_dir: where data sets are; need not be there.
    """
    packages = {
        str(canonicalize_name(dist.name)): dist.version
        for dist in importlib.metadata.distributions()
        if dist.name  # a broken installation has none
    }
    requirements = {}
    for name in ("jax", "jaxcompute"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            requirements[name] = tuple(importlib.metadata.requires(name) or ())
    nvml_error, driver = None, None
    try:
        driver = nvml.driver()  # before jax takes the memory
    except nvml.Missing as error:
        nvml_error = str(error)
    cache_error = None if "://" in cache else _write_error(Path(cache))
    return Facts(
        python=platform.python_version(),
        packages=packages,
        requirements=requirements,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        pci_gpus=_pci_gpus(),
        nvml_error=nvml_error,
        driver=driver,
        tensorflow=_tensorflow(packages),
        cache=cache,
        cache_error=cache_error,
        data_dir=str(data_dir),
        data_sets=_data_sets(data_dir),
        shared_memory=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        **_jax(cache_error is None),
        **_workdir(workdir),
        **_host(),
    )


def _jax(cached: bool) -> dict[str, Any]:
    """What jax says of itself; it may not even be importable."""
    facts: dict[str, Any] = dict.fromkeys(("jax_error", "platform", "cuda_error"))
    facts |= {"devices": (), "bfloat16_broken": False, "nan_hidden": None, "cache_hit": False}
    facts["libraries"] = _libraries()
    try:
        import jax

        from jaxcompute import train

        devices = jax.devices()
        facts |= {"platform": devices[0].platform, "devices": tuple(device.device_kind for device in devices)}
        facts["bfloat16_broken"] = train.broken_bfloat16(devices[0].platform)
        facts["nan_hidden"] = _hides_nan(jax) if devices[0].platform == "cpu" else None
        facts["cache_hit"] = cached and _cache_hit(jax)
    except Exception as error:
        return facts | {"jax_error": line_of(error)}
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        facts["cuda_error"] = line_of(error)
    facts["tensorflow_loaded"] = "tensorflow" in sys.modules
    return facts


def _hides_nan(jax: Any) -> bool:
    """Whether a program gives a number for a NaN, whatever jax's settings are."""
    with jax.debug_nans(False), jax.disable_jit(False):
        y = jax.jit(lambda x: jax.nn.relu(x).sum((1, 2)))(jax.numpy.full((4, 8, 8, 64), jax.numpy.nan))
        return not jax.numpy.isnan(y).all()


def _cache_hit(jax: Any) -> bool:
    """Compile a small function, forget it, and see whether it comes from the cache."""
    events: list[str] = []

    def compiled() -> None:
        jax.jit(lambda x: x * 3 + 1).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()

    compiled()
    jax.clear_caches()
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    compiled()
    return "/jax/compilation_cache/cache_hits" in events


def _libraries() -> dict[str, tuple[int, int]]:
    for plugin in ("jax_cuda12_plugin", "jax_cuda13_plugin"):
        with contextlib.suppress(Exception):  # a library that isn't there may raise anything
            versions = importlib.import_module(f"{plugin}._versions")
            asked = {"CUDA": "cuda_runtime", "cuDNN": "cudnn"}
            return {
                name: (getattr(versions, f"{word}_get_version")(), getattr(versions, f"{word}_build_version")())
                for name, word in asked.items()
            }
    return {}


def _pci_gpus() -> int:
    """NVIDIA's display and 3D controllers on the bus, else the driver's device files (a container may hide the bus)."""
    found = 0
    for device in glob.glob("/sys/bus/pci/devices/*"):
        with contextlib.suppress(OSError):
            vendor, kind = (Path(device, name).read_text().strip() for name in ("vendor", "class"))
            found += vendor == "0x10de" and kind.startswith(("0x0300", "0x0302"))
    return found or len(glob.glob("/dev/nvidia[0-9]*"))


def _tensorflow(packages: Mapping[str, str]) -> str | None:
    if "tensorflow" not in sys.modules and importlib.util.find_spec("tensorflow") is None:
        return None
    return packages.get("tensorflow") or packages.get("tensorflow-cpu") or "of unknown version"


def _write_error(folder: Path) -> str | None:
    """Why a folder, made if need be, can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _workdir(workdir: Path) -> dict[str, Any]:
    there = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.is_dir())
    facts = {"workdir": str(there), "workdir_error": None, "disk_free": 0, "write_speed": None}
    block, count = os.urandom(2**20), 64  # random, as some disks compress
    try:
        facts["disk_free"] = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            began = time.perf_counter()
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            facts["write_speed"] = count * len(block) / (time.perf_counter() - began)
    except OSError as error:
        facts["workdir_error"] = error.strerror or str(error)
    return facts


def _data_sets(folder: Path) -> tuple[str, ...] | None:
    """Names of the sets prepared in it, as ArrayRecord or as plain arrays."""
    if not folder.is_dir():
        return None
    records = {path.parts[-3] for path in folder.glob("*/*/dataset_info.json")}
    return tuple(sorted(records | {path.stem for path in folder.glob("jaxcompute/*.npz")}))


def _host() -> dict[str, Any]:
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quota = float(len(own))
    with contextlib.suppress(OSError, ValueError):  # cgroup 2: "max 100000" or "200000 100000"
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = min(quota, int(most) / int(period))
    nodes = {}
    for node in glob.glob("/sys/devices/system/node/node[0-9]*"):
        with contextlib.suppress(OSError):
            nodes[int(node.rpartition("node")[2])] = _cpu_list(Path(node, "cpulist").read_text())
    return {
        "cpus": os.cpu_count() or 1,
        "cpus_usable": quota,
        "numa_nodes": len(nodes) or 1,
        "numa_own": tuple(sorted(node for node, cpus in nodes.items() if cpus & own)),
    }


def _cpu_list(text: str) -> set[int]:
    """0-3,8 as a set."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


# -- the page ----------------------------------------------------------------------------------------------------------


def run(cache: str, workdir: Path, data_dir: Path, as_json: bool = False, seconds: float = 8.0) -> int:
    """Print the page, or a JSON object. The exit code: 0 for pass and warn, 1 for fail.

    Args:
        seconds: to measure for, about.
    """
    terminal = sys.stdout.isatty() and not as_json
    checks: list[Check] = []

    def show(facts: Facts, of: tuple[Callable[[Facts], Check], ...]) -> None:
        for check in of:
            checks.append(check(facts))
            if not as_json:
                print(page(checks[-1:], color=terminal), flush=True)

    facts = gather(cache, workdir, data_dir)
    show(facts, SEEN)
    if terminal:
        print(f"measuring for {seconds:.0f} s ...", end="\r", flush=True)
    facts = measured(facts, seconds)
    show(facts, MEASURED if facts.ceilings else UNMEASURED)
    worst = verdict(checks)
    if as_json:
        measures = facts.ceilings._asdict() if facts.ceilings else None
        print(
            json.dumps(
                {"verdict": worst, "checks": [check._asdict() for check in checks], "measured": measures}, indent=2
            )
        )
    else:
        count = {word: sum(check.verdict == word for check in checks) for word in MARKS}
        print("  ".join(f"{number} {word}" for word, number in count.items()))
    return int(worst == "fail")


def measured(facts: Facts, seconds: float) -> Facts:
    """The facts with the ceilings of the first device, or why there are none, and the GPUs' state just after."""
    if facts.jax_error:
        return facts
    import jax

    from jaxcompute.compute import ceilings

    try:
        facts = dataclasses.replace(facts, ceilings=ceilings.measure(seconds))
    except jax.errors.JaxRuntimeError as error:  # another process holds the GPU, say
        facts = dataclasses.replace(facts, unmeasured=line_of(error))
    loaded = None
    with contextlib.suppress(nvml.Missing):
        loaded = nvml.driver()
    return dataclasses.replace(facts, loaded=loaded)


def verdict(checks: list[Check]) -> Verdict:
    found = {check.verdict for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def page(checks: list[Check], color: bool = False) -> str:
    """A line a check, and below it the mend where there is one."""
    lines = []
    for check in checks:
        mark = MARKS[check.verdict] if color else check.verdict
        lines.append(f"{mark}  {check.name:<14}  {check.seen}")
        if check.mend:
            lines.append(f"{'':<22}mend: {check.mend}")
    return "\n".join(lines)

"""What the NVIDIA driver tells of its GPUs, by NVML; a value that a chip doesn't tell is None.

`pynvml` (package nvidia-ml-py, in the extras cuda12 and cuda13) is imported where it is used, and every function takes
the module, so that a test hands in another.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

THROTTLES = {  # of nvmlClocksEventReasons; the power cap isn't among them, as a busy GPU is always at it
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


class Gpu(NamedTuple):
    """One GPU as the driver sees it."""

    name: str
    memory: int  # bytes
    memory_free: int | None
    power_cap: float | None  # watts
    power_default: float | None  # watts
    clock: int | None  # MHz of the multiprocessors, now
    clock_max: int | None
    temperature: int | None  # degrees Celsius
    throttled_by: tuple[str, ...] = ()
    link_width: tuple[int, int] | None = None  # PCIe lanes now, and at most
    others: int = 0  # processes that compute on it, this one left out
    numa_node: int | None = None


class Driver(NamedTuple):
    version: str
    cuda: tuple[int, int]  # the newest CUDA it runs
    gpus: tuple[Gpu, ...]


class Missing(Exception):
    """NVML can't be asked; the message says why."""


@contextlib.contextmanager
def session(pynvml: Any = None) -> Iterator[Any]:
    """The module, its library loaded.

    Raises:
        Missing: no pynvml, no driver, or a driver that doesn't answer, be it later and to what it is asked here.
    """
    try:
        pynvml = pynvml or importlib.import_module("pynvml")
    except ImportError:
        raise Missing("pynvml is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Missing(str(error)) from None
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise Missing(str(error)) from None
    finally:
        told(pynvml, pynvml.nvmlShutdown)


def driver(pynvml: Any = None) -> Driver:
    """All that doctor asks. Raises Missing."""
    with session(pynvml) as pynvml:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(pynvml, handle) for handle in handles)
        return Driver(pynvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10), gpus)


def _gpu(pynvml: Any, handle: Any) -> Gpu:
    def ask(name: str, *arguments: Any) -> Any:
        return told(pynvml, lambda: getattr(pynvml, name)(handle, *arguments))

    memory, cap, default = (
        ask("nvmlDeviceGetMemoryInfo"),
        ask("nvmlDeviceGetEnforcedPowerLimit"),
        ask("nvmlDeviceGetPowerManagementDefaultLimit"),
    )
    width, widest = ask("nvmlDeviceGetCurrPcieLinkWidth"), ask("nvmlDeviceGetMaxPcieLinkWidth")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
    processes = ask("nvmlDeviceGetComputeRunningProcesses") or []
    return Gpu(
        name=ask("nvmlDeviceGetName") or "GPU without a name",
        memory=memory.total if memory else 0,
        memory_free=memory.free if memory else None,
        power_cap=cap and cap / 1000,
        power_default=default and default / 1000,
        clock=ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
        clock_max=ask("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
        temperature=ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        throttled_by=tuple(name for bit, name in THROTTLES.items() if reasons & bit),
        link_width=(width, widest) if width and widest else None,
        others=sum(process.pid != os.getpid() for process in processes),
        numa_node=_numa_node(ask("nvmlDeviceGetPciInfo")),
    )


def _numa_node(pci: Any) -> int | None:
    bus = getattr(pci, "busId", b"")
    bus = bus.decode() if isinstance(bus, bytes) else bus
    try:
        with open(f"/sys/bus/pci/devices/{bus[-12:].lower()}/numa_node") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def told(pynvml: Any, ask: Callable[[], T]) -> T | None:
    """The answer, or None where this chip or driver has none."""
    try:
        return ask()
    except (pynvml.NVMLError, AttributeError):
        return None


def visible(pynvml: Any) -> list[Any]:
    """Handles of the GPUs that CUDA shows this process, by CUDA_VISIBLE_DEVICES; one of a shared GPU (MIG) has none.

    Nor has one that CUDA knows by a number, where the GPUs are not all alike: CUDA numbers the fastest first, unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID, and NVML goes by the bus.
    """
    gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    alike = len({pynvml.nvmlDeviceGetName(gpu) for gpu in gpus}) == 1
    numbered = gpus if alike or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" else []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return numbered
    handles = []
    for name in filter(None, (part.strip() for part in named.split(","))):
        if name.isdecimal():
            found = numbered[int(name) :][:1]
        else:  # GPU- and as much of the rest as no other has
            found = [gpu for gpu in gpus if pynvml.nvmlDeviceGetUUID(gpu).startswith(name)]
        if len(found) != 1:
            break  # as CUDA does: what follows a name it doesn't know is not seen
        handles += found
    return handles

"""Joules by the GPUs' own counters (NVML's total energy since the driver was loaded; Volta and newer)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxcompute.compute import nvml


@contextlib.contextmanager
def meter(devices: Sequence[Any], pynvml: Any = None) -> Iterator[Callable[[], float | None]]:
    """Joules that these JAX devices have used since some moment before: only differences mean something.

    It reads None where there is no NVML, or where one of them doesn't tell: a part of the energy is not the energy.
    """
    with contextlib.ExitStack() as stack:
        handles = []
        if all(device.platform == "gpu" for device in devices):
            with contextlib.suppress(nvml.Missing, IndexError):  # IndexError: a shared GPU, which has no counter
                pynvml = stack.enter_context(nvml.session(pynvml))
                visible = nvml.told(pynvml, lambda: nvml.visible(pynvml)) or []
                handles = [visible[device.local_hardware_id] for device in devices]

        def joules() -> float | None:
            if not handles:
                return None
            read = pynvml.nvmlDeviceGetTotalEnergyConsumption
            return nvml.told(pynvml, lambda: sum(map(read, handles)) / 1000)

        yield joules

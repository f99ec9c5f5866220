"""Joules by the GPUs' own counters (NVML's total energy since the driver was loaded; Volta and newer)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxcompute.compute import nvml


@contextlib.contextmanager
def meter(count: int, pynvml: Any = None) -> Iterator[Callable[[], float | None]]:
    """Joules that the first `count` visible GPUs have used since some moment before: only differences mean something.

    It reads None where there is no NVML, or where one of them doesn't tell: a part of the energy is not the energy.
    """
    with contextlib.ExitStack() as stack:
        try:
            pynvml = stack.enter_context(nvml.session(pynvml))
            handles = nvml.visible(pynvml)[:count]
        except nvml.Missing:
            handles = []

        def joules() -> float | None:
            if len(handles) < count:
                return None
            read = pynvml.nvmlDeviceGetTotalEnergyConsumption
            return nvml.told(pynvml, lambda: sum(map(read, handles)) / 1000)

        yield joules

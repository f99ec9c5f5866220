"""NVML of a made-up machine: the functions of pynvml that the instruments call, over plain values."""

import types
from typing import Any


class NVMLError(Exception):
    pass


def fail(why: str) -> Any:
    raise NVMLError(why)


H100 = {
    "Name": "NVIDIA H100 80GB HBM3",
    "MemoryInfo": types.SimpleNamespace(total=80 * 10**9, free=79 * 10**9),
    "EnforcedPowerLimit": 700_000,
    "PowerManagementDefaultLimit": 700_000,
    "ClockInfo": 1980,
    "MaxClockInfo": 1980,
    "Temperature": 35,
    "CurrentClocksEventReasons": 0,
    "CurrPcieLinkWidth": 16,
    "MaxPcieLinkWidth": 16,
    "ComputeRunningProcesses": [],
    "PciInfo": types.SimpleNamespace(busId="00000000:FF:1F.0"),
    "TotalEnergyConsumption": 5_000_000,  # millijoules
}


def nvml(*gpus: dict[str, Any], driver: str = "580.65.06", cuda: int = 13000, error: str = "") -> Any:
    """A stand-in for the module. A value that is a function is called anew at each reading; one that is missing isn't
    told by the chip; with `error` the library can't be loaded."""

    def start() -> None:
        if error:
            fail(error)

    def ask(name: str) -> Any:
        def answer(handle: int, *_: Any) -> Any:
            if name not in gpus[handle]:
                fail("Not Supported")
            value = gpus[handle][name]
            return value() if callable(value) else value

        return answer

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: driver,
        nvmlSystemGetCudaDriverVersion_v2=lambda: cuda,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}932f937-0000",
        **{f"nvmlDeviceGet{name}": ask(name) for name in H100},
    )

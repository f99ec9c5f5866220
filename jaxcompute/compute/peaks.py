"""What a chip can do at most, as its maker says: dense arithmetic (no 2:4 sparsity) and memory traffic.

Tensor cores count with float32 accumulation, which is what XLA asks for. A chip that is not in the table has no peak
here: `ceilings.py` measures one.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Peaks of one chip; None: it has no such unit."""

    bfloat16: float | None  # FLOP/s
    tensorfloat32: float | None  # FLOP/s
    float32: float  # FLOP/s
    bandwidth: float  # bytes/s of its memory
    source: str


T, G = 1e12, 1e9
AMPERE = "NVIDIA A100 Tensor Core GPU datasheet (2021)"
HOPPER = "NVIDIA H100 Tensor Core GPU datasheet (2023); its tensor figures are sparse, here halved"
# by JAX's device_kind, which is the driver's name of the chip
CHIPS = {
    "Tesla V100-SXM2-16GB": Chip(None, None, 15.7 * T, 900 * G, "NVIDIA V100 datasheet (2020)"),
    "Tesla V100-SXM2-32GB": Chip(None, None, 15.7 * T, 900 * G, "NVIDIA V100 datasheet (2020)"),
    "Tesla V100-PCIE-16GB": Chip(None, None, 14 * T, 900 * G, "NVIDIA V100 datasheet (2020)"),
    "Tesla V100-PCIE-32GB": Chip(None, None, 14 * T, 900 * G, "NVIDIA V100 datasheet (2020)"),
    "Tesla T4": Chip(None, None, 8.1 * T, 320 * G, "NVIDIA T4 datasheet (2019)"),
    "NVIDIA A100-SXM4-40GB": Chip(312 * T, 156 * T, 19.5 * T, 1555 * G, AMPERE),
    "NVIDIA A100-PCIE-40GB": Chip(312 * T, 156 * T, 19.5 * T, 1555 * G, AMPERE),
    "NVIDIA A100-SXM4-80GB": Chip(312 * T, 156 * T, 19.5 * T, 2039 * G, AMPERE),
    "NVIDIA A100 80GB PCIe": Chip(312 * T, 156 * T, 19.5 * T, 1935 * G, AMPERE),
    "NVIDIA A10": Chip(125 * T, 62.5 * T, 31.2 * T, 600 * G, "NVIDIA A10 datasheet (2021)"),
    "NVIDIA L4": Chip(121 * T, 60 * T, 30.3 * T, 300 * G, "NVIDIA L4 datasheet (2023), halved as sparse"),
    "NVIDIA L40S": Chip(362 * T, 183 * T, 91.6 * T, 864 * G, "NVIDIA L40S datasheet (2023)"),
    "NVIDIA GeForce RTX 3090": Chip(71 * T, 35.6 * T, 35.6 * T, 936 * G, "NVIDIA GA102 whitepaper, table 3"),
    "NVIDIA GeForce RTX 4090": Chip(165.2 * T, 82.6 * T, 82.6 * T, 1008 * G, "NVIDIA Ada whitepaper, appendix A"),
    "NVIDIA GeForce RTX 5090": Chip(209.5 * T, 104.8 * T, 104.8 * T, 1792 * G, "NVIDIA RTX Blackwell whitepaper"),
    "NVIDIA H100 80GB HBM3": Chip(989.4 * T, 494.7 * T, 66.9 * T, 3350 * G, HOPPER),
    "NVIDIA H100 PCIe": Chip(756 * T, 378 * T, 51.2 * T, 2000 * G, HOPPER),
    "NVIDIA H100 NVL": Chip(835 * T, 417 * T, 60 * T, 3900 * G, HOPPER),
    "NVIDIA H200": Chip(989.4 * T, 494.7 * T, 66.9 * T, 4800 * G, "NVIDIA H200 datasheet (2024), halved as sparse"),
    "NVIDIA B200": Chip(2250 * T, 1125 * T, 75 * T, 8000 * G, "NVIDIA HGX and DGX B200 datasheets, an eighth, halved"),
}


def chip(kind: str) -> Chip | None:
    """By a JAX device's `device_kind`; None where the table doesn't have it."""
    return CHIPS.get(kind)


def flops(kind: str, precision: str) -> float | None:
    """FLOP/s that a run of this precision can reach at most on such a device; None where it isn't known."""
    found = chip(kind)
    return None if found is None else getattr(found, arithmetic(kind, precision), None)


def arithmetic(kind: str, precision: str) -> str:
    """What a run's matrix products are computed in: by default XLA takes TF32 for float32 where the chip has it."""
    import jax  # here: doctor reads the table where jax can't be imported

    found = chip(kind)
    if precision == "bfloat16" and found and found.bfloat16 is None:
        return "float32"  # as bfloat16 is widened where no unit computes in it
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32", "F32_F32_F32")  # pyright: ignore[reportAttributeAccessIssue]
    if precision == "float32" and found and found.tensorfloat32 and not exact:
        return "tensorfloat32"
    return precision

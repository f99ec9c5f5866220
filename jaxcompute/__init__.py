"""jaxcompute: train CNNs and MLPs in JAX on NVIDIA GPUs, and measure what the hardware gave."""

__version__ = "0.1.0"

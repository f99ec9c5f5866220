"""Lengths, schedules and weight decay: what optax does not have in one line.

Adam and its kin come straight from optax: `optax.adamw(schedule, weight_decay=0.05, mask=decay_mask)`. Muon, for
convolutions, is optax's with two things that these ask for.
"""

import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxcompute.core import PyTree, Run
from jaxcompute.errors import BadInput


def total_steps(config: Run, size: int) -> int:
    """Optimizer steps of a run over `size` examples: `steps`, or enough for `epochs`.

    Raises:
        BadInput: a length or batch size that is not positive.
    """
    if config.batch_size < 1:
        raise BadInput(f"--config.batch_size={config.batch_size}: give 1 or more")
    if config.steps < 0:
        raise BadInput(f"--config.steps={config.steps}: give 1 or more, or 0 to go by --config.epochs")
    if config.steps:
        return config.steps
    if not 0 < config.epochs < math.inf:
        raise BadInput(f"--config.epochs={config.epochs}: give a positive number, or set --config.steps")
    batches = config.epochs * size / config.batch_size
    return max(1, math.ceil(batches - 1e-6))  # 1.1 * 100 / 10 is 11.000000000000002, which is 11 batches


def small_steps(config: Run, small_epochs: float, size: int) -> int:
    """Steps of the first epochs, whose images are smaller (`step.small_first`), of a run over `size` examples.

    Raises:
        BadInput: they leave none for whole images.
    """
    small, steps = math.ceil(small_epochs * size / config.batch_size), total_steps(config, size)
    if small >= steps:
        raise BadInput(
            f"--config.small_epochs={small_epochs}: {small:,} steps of {steps:,} leave none for whole images; give less"
        )
    return small


def check_warmup(config: Run, warmup_epochs: float) -> None:
    """Raise BadInput where the warm-up is longer than the run."""
    if warmup_epochs > config.epochs:
        raise BadInput(
            f"--config.warmup_epochs={warmup_epochs}: is longer than --config.epochs={config.epochs}; give less"
        )


def warmup_cosine(peak: float, steps: int, warmup_steps: int, end: float = 0.0) -> optax.Schedule:
    """From 0 to `peak` in a line, then to `end` in half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983).

    A warm-up as long as the run or longer is cut to steps - 1, so that a trial of two steps needs no other setting.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup_steps, steps - 1), steps, end)


def decay_mask(params: PyTree) -> PyTree:
    """True for kernels, which weight decay shrinks; false for biases and norms, of one axis or none."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Momentum, Nesterov's by default, and L2 decay of kernels: decay * kernel joins the gradient before momentum."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def muon(learning_rate: optax.ScalarOrSchedule, momentum: float, steps: int = 5) -> optax.GradientTransformation:
    """For the kernels [h, w, C, D] of convolutions that a batch norm follows, which has no use for their length.

    Each kernel is brought to norm sqrt(D), and then turned: by the momentum as a matrix [h w C, D], made orthogonal or
    nearly so, its singular values all about 1 (Jordan 2024, kellerjordan.github.io/posts/muon). So the learning rate is
    about by how much of itself a kernel turns in a step, less where D is the greater side.

    Args:
        momentum: of Nesterov's form.
        steps: of Newton and Schulz's iteration, which bring the singular values together.
    """
    as_matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=steps, beta=momentum, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: as_matrix, tree)
    )
    return optax.chain(orthogonal, optax.scale_by_learning_rate(learning_rate), optax.stateless(_on_sphere))


def _on_sphere(updates: PyTree, params: PyTree) -> PyTree:
    def onto(update: jax.Array, kernel: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(kernel)
        return update + kernel * (kernel.shape[-1] ** 0.5 / jnp.where(length > 0, length, 1) - 1)

    return jax.tree.map(onto, updates, params)

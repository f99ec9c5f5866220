"""Floating-point operations of a traced function: those of its matrix products and convolutions, a multiply and an add
as two, as papers count them. What XLA fuses, pads or rewrites does not change the count.
"""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def count(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Of one call, over all devices.

    At least: a result that nothing takes up counts nothing. A loop counts its body as often as it runs, where that is
    known when it is traced (scan), else once; of the branches of a conditional the shortest counts, as of those for
    different platforms, which compute the same. What is computed again in the backward pass (`jax.checkpoint`) counts
    again. A kernel of one's own (ffi, Pallas) counts nothing.
    """
    plain: Any = getattr(jaxpr, "jaxpr", jaxpr)
    used = {id(variable) for equation in plain.eqns for variable in equation.invars} | set(map(id, plain.outvars))
    return sum(_equation(equation) for equation in plain.eqns if not used.isdisjoint(map(id, equation.outvars)))


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left, out = equation.invars[0].aval, equation.outvars[0].aval
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out.size * math.prod(left.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        image, kernel, out = *(x.aval for x in equation.invars), equation.outvars[0].aval
        features_out, features_in, *window = params["dimension_numbers"].rhs_spec
        taps = math.prod(kernel.shape[i] for i in window)
        groups = params["feature_group_count"] * params["batch_group_count"]
        # Each output takes from every tap, and each input gives to every tap: where one is the less, as in an input
        # gradient, whose image is spread and widened with zeros, the rest are products with zeros.
        taken = out.size * taps * kernel.shape[features_in]
        given = image.size * taps * kernel.shape[features_out] / groups
        return 2.0 * min(taken, given)
    if name == "pallas_call":  # its body runs as often as its grid says, and may be guarded there
        return 0.0
    inner = [
        count(value)
        for value in jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, ClosedJaxpr | Jaxpr))
        if isinstance(value, ClosedJaxpr | Jaxpr)
    ]
    if name == "cond":
        return min(inner)
    times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
    return times * sum(inner)

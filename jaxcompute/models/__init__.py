"""Model families, one a file: flax.linen and jax alone, so copy one out (with norm.py, pooling.py if it has them)."""

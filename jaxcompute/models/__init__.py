"""Model families, one a file: flax.linen and jax alone, so copy one out with the files here that it imports."""

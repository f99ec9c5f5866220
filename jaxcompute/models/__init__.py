"""Model families, one a file: flax.linen and jax alone, so copy one out (lenet and cnn with pooling.py)."""

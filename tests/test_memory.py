import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompute.data import memory, order
from jaxcompute.errors import BadInput


def arrays(size):
    return {
        "image": np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1),
        "label": np.arange(size, dtype=np.int32),
    }


@pytest.mark.parametrize("size, batch_size", [(7, 3), (6, 3), (5, 8), (1, 1)])
def test_in_order_holds_every_example_once(size, batch_size):
    source = memory.in_order(arrays(size), batch_size)
    batches = [jax.jit(source.batch)(source.feed(step), jnp.int32(step)) for step in range(source.steps)]
    assert all(batch["label"].shape == batch["mask"].shape == (batch_size,) for batch in batches)
    for name, expected in source.arrays.items():
        kept = [np.asarray(batch[name])[np.asarray(batch["mask"])] for batch in batches]
        np.testing.assert_array_equal(np.concatenate(kept), expected)


def test_shuffled_follows_the_order():
    source = memory.shuffled(arrays(7), 3, seed=5)
    for step in (0, 2, 9):
        batch = jax.jit(source.batch)(source.feed(step), jnp.int32(step))
        rows = order.indices(5, step, 3, 7, np)
        assert set(batch) == {"image", "label"}
        np.testing.assert_array_equal(batch["label"], rows)
        np.testing.assert_array_equal(batch["image"], source.arrays["image"][rows])


@pytest.mark.parametrize("make", [memory.in_order, lambda a, b: memory.shuffled(a, b, 0)])
def test_x64_leaves_dtypes_as_they_are(make):
    source = make(arrays(5), 2)
    with jax.enable_x64(True):
        batch = jax.jit(source.batch)(source.feed(0), jnp.int32(1))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32


def test_another_batch_size_is_the_same_set():
    source = memory.shuffled(arrays(7), 3, seed=5)
    other = source.with_batch_size(4)
    assert (other.batch_size, other.steps, other.size, other.seed, other.resident) == (4, 2, 7, 5, True)
    assert other.arrays is source.arrays
    assert hash(source) != hash(other) and source != other  # neither looks into the arrays


@pytest.mark.parametrize(
    "wrong, batch_size, message",
    [
        ({}, 2, "no examples"),
        ({"image": np.zeros((0, 2)), "label": np.zeros(0, int)}, 2, "no examples"),
        ({"image": np.zeros((3, 2)), "label": np.zeros(2, int)}, 2, "differ in length"),
        ({"image": np.zeros((2, 2)), "label": np.array(["cat", "dog"])}, 2, "'label' holds <U3"),
        ({"image": np.zeros((2, 2)), "label": np.array([0, -1])}, 2, "number the classes from 0"),
        ({"image": np.zeros((2, 2))}, 0, "batch_size is 0"),
    ],
)
def test_wrong_arrays_are_named(wrong, batch_size, message):
    for make in (memory.in_order, lambda a, b: memory.shuffled(a, b, 0)):
        with pytest.raises(BadInput, match=message):
            make(wrong, batch_size)

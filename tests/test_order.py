import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompute.data import order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1009, 1438, 60_000])
def test_an_epoch_holds_each_example_once_in_numpy_and_jax_alike(size):
    batch = max(1, size // 3)  # batches run on across the epoch's end
    steps = -(-3 * size // batch)
    jitted = jax.jit(lambda step: order.indices(7, step, batch, size, jnp))
    batches = [order.indices(7, step, batch, size, np) for step in range(steps)]
    for step in (0, steps - 1):
        on_device = jitted(jnp.int32(step))
        assert on_device.dtype == batches[step].dtype == np.uint32
        np.testing.assert_array_equal(on_device, batches[step])
    epochs = np.concatenate(batches)[: 3 * size].reshape(3, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(size), (3, size)))


def test_one_batch_may_hold_many_epochs():
    epochs = order.indices(0, 0, 50, 5, np).reshape(10, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()


def test_bits_do_not_depend_on_x64_or_on_the_steps_type():
    expected = order.indices(3, 123_456, 64, 50_001, np)
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            for dtype in (jnp.int32, jnp.uint32):
                got = jax.jit(lambda step: order.indices(3, step, 64, 50_001, jnp))(dtype(123_456))
                np.testing.assert_array_equal(got, expected)


def test_golden_order():
    """A checkpoint resumes on these bits: change them and every run in progress changes its order."""
    assert order.indices(0, 0, 8, 60_000, np).tolist() == [53757, 31546, 33608, 1336, 46400, 54318, 8978, 16355]


def epochs_of(size, seeds):
    """[epochs, size]: the first epochs of one seed, or the first epoch of many."""
    if seeds == "one":
        return order.indices(5, 0, size * 20_000, size, np).reshape(-1, size).astype(int)
    return np.stack([order.indices(seed, 0, size, size, np) for seed in range(5_000)]).astype(int)


def deviations(cells, kinds):
    """Standard deviations by which the chi-square of equally likely cells misses its mean."""
    counts = np.unique(cells, return_counts=True)[1]
    expected = len(cells) / kinds
    chi_square = (counts**2).sum() / expected - len(cells)
    return (chi_square - (kinds - 1)) / np.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("seeds", ["one", "many"])
@pytest.mark.parametrize("size", [16, 37])
def test_small_sets_are_shuffled_evenly(size, seeds):
    """4 rounds miss the pairs by 15 standard deviations and more, and keep 1.1 times the neighbours of chance."""
    epochs = epochs_of(size, seeds)
    assert abs(deviations(epochs[:, 0], size)) < 4
    assert abs(deviations(epochs[:, 0] * size + epochs[:, 1], size * (size - 1))) < 4
    assert abs(deviations(epochs[:, 2] * size + epochs[:, -1], size * (size - 1))) < 4
    neighbours = (np.abs(np.diff(epochs, axis=1)) == 1).mean() * size / 2
    assert neighbours == pytest.approx(1, abs=0.03)


def test_a_large_set_is_shuffled_and_differs_by_seed_and_epoch():
    size = 60_000
    one, next_epoch, other_seed = (
        order.indices(seed, step, size, size, np).astype(int) for seed, step in ((0, 0), (0, 1), (1, 0))
    )
    assert np.abs(one - np.arange(size)).mean() == pytest.approx(size / 3, rel=0.02)
    assert (np.abs(np.diff(one)) == 1).sum() < 12  # 2 by chance
    for other in (next_epoch, other_seed):
        assert (one == other).sum() < 8  # 1 by chance
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02

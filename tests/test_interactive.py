"""Predictions are the evaluation's; pictures show what they are given."""

import io

import jax
import numpy as np
import pytest
import tiny

from jaxcompute import interactive
from jaxcompute.errors import BadInput


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[interactive.Trained, str]:
    workdir = str(tmp_path_factory.mktemp("run"))
    return interactive.fit(tiny.mlp(ema=0.8), workdir), workdir


def drawn(figure):
    """Figure, once laid out and drawn: what matplotlib warns of, it warns of there."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def test_history_is_kept_and_found_again_in_a_finished_run(run):
    trained, workdir = run
    assert trained.history["train/loss"][0] == [4, 8, 12]
    assert trained.history["eval/accuracy"][0] == [6, 12]
    assert trained.history["eval/accuracy"][1][-1] == interactive.evaluate(trained.exp, trained.state)["accuracy"]
    again = interactive.fit(trained.exp, workdir)
    assert again.history == trained.history
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.state.params, trained.state.params)))


def test_predictions_are_those_of_the_evaluation(run):
    trained, _ = run
    data = tiny.arrays(23)  # three batches of 8, the last padded
    results = interactive.evaluate(trained.exp, trained.state)
    probabilities = interactive.predict(trained.exp, trained.state, data["image"])
    assert probabilities.shape == (23, 3)
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (data["label"], probabilities.argmax(-1)), 1)
    np.testing.assert_array_equal(counts, results["confusion"])
    # the loss tells the averaged parameters from the last ones
    np.testing.assert_allclose(-np.log(probabilities[np.arange(23), data["label"]]).mean(), results["loss"], rtol=1e-5)
    few = interactive.predict(trained.exp, trained.state, data["image"][:2])
    np.testing.assert_allclose(few, probabilities[:2], rtol=1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((6, 6, 1), np.uint8), np.zeros((2, 6, 6, 1)), np.zeros((0, 6, 6, 1), np.uint8)]
)
def test_images_unlike_those_of_the_evaluation_are_refused(run, images: np.ndarray):
    with pytest.raises(BadInput, match=r"give uint8 \[N, 6, 6, 1\]"):
        interactive.predict(run[0].exp, run[0].state, images)


def test_curves_hold_the_history(run):
    history = run[0].history
    loss, accuracy = drawn(interactive.curves(history, steps=20)).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [history["train/loss"][1], history["eval/loss"][1]]
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[4, 8, 12], [6, 12]]
    assert loss.get_yscale() == "log"
    assert accuracy.get_xlim() == (0, 20)
    zero = {"train/loss": ([1, 2], [1.0, 0.0])}  # no logarithm, no accuracy
    (panel,) = drawn(interactive.curves(history, zero, names=("a", "b"), metrics=("loss", "loss_of_none"))).axes
    assert panel.get_yscale() == "linear"
    assert len(panel.lines) == 3


def test_gallery_begins_with_the_wrong_and_surest():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    label, images = np.array([0, 0, 0, 0]), np.zeros((4, 2, 2, 3), np.uint8)
    by_order = drawn(interactive.gallery(images, probabilities, label, ("cat", "dog"), wrong_first=False, columns=3))
    assert [axes.get_title() for axes in by_order.axes] == ["cat  90%", "dog  80%", "cat  60%", "dog  70%"]
    found = drawn(interactive.gallery(images, probabilities, label, ("cat", "dog"), rows=1, columns=3)).axes
    assert [(axes.get_title(), axes.get_xlabel()) for axes in found] == [
        ("dog  80%", "is cat"),
        ("dog  70%", "is cat"),
        ("cat  60%", ""),
    ]


def test_confusion_counts_right_in_blue_and_wrong_in_red():
    counts = np.array([[3, 1, 0], [0, 2000, 0], [0, 0, 0]])  # and a class without examples
    (axes,) = drawn(interactive.confusion(counts, ("cat", "dog", "elk"))).axes
    assert {text.get_text() for text in axes.texts} == {"3", "1", "2,000", "75.0%", "100.0%", "", "accuracy"}
    red, _, blue, _ = np.moveaxis(np.asarray(axes.images[0].get_array()), -1, 0)
    assert blue[0, 0] > red[0, 0]
    assert red[0, 1] > blue[0, 1]
    assert red[0, 2] == blue[0, 2] == red[2, 2] == 1
    drawn(interactive.confusion(np.eye(100, dtype=int)))

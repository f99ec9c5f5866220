import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import threading
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxcompute import checkpoint, core, log, metrics, optim, sharding, train
from jaxcompute.data import memory
from jaxcompute.errors import BadInput, line_of
from jaxcompute.models.mlp import MLP

quiet = lambda text: None  # noqa: E731
PERF = ("perf/", "mem/")  # timings differ from run to run


def fit(exp, workdir=None, **kwargs):
    return train.fit(exp, workdir, say=quiet, **kwargs)


def on(devices: int, **fields):
    return {"mesh_data": devices, **fields}


def without_times(workdir) -> dict:
    return {
        step: {tag: value for tag, value in values.items() if not tag.startswith(PERF)}
        for step, values in log.read(workdir).items()
    }


@pytest.mark.parametrize("split", ["train", "eval"])
def test_labels_out_of_range_are_told_before_anything_is_compiled(split, tmp_path):
    exp = tiny.mlp()
    source = getattr(exp, split)
    label = source.arrays["label"].copy()
    label[5] = 3
    spoiled = dataclasses.replace(source, arrays=source.arrays | {"label": label})
    with pytest.raises(BadInput, match=f"^{split}: a label is 3 and there are 3 classes; count from 0$"):
        fit(dataclasses.replace(exp, **{split: spoiled}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Stop(Exception):
    pass


def stop_at(step: int):
    """A writer that breaks the run off once it has dispatched that step."""

    def write(at: int, values: dict) -> None:
        if at >= step:
            raise Stop

    return write


@pytest.mark.parametrize("make", [tiny.mlp, tiny.resnet], ids=["mlp", "batch-norm resnet"])
def test_a_resumed_run_equals_the_unbroken_one_in_every_bit(make, tmp_path):
    exp = make(save_every=5, ema=0.9, mesh_data=1)
    unbroken = fit(exp, tmp_path / "unbroken")
    with pytest.raises(Stop):
        fit(exp, tmp_path / "broken", write=stop_at(11))
    assert checkpoint.steps(tmp_path / "broken/checkpoints")[-1] == 10
    resumed = fit(exp, tmp_path / "broken")
    assert checkpoint.digest(resumed) == checkpoint.digest(unbroken)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "unbroken")
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 6, 8, 12, 12]


def test_every_file_of_the_work_directory(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    fit(tiny.mlp(**on(1)), tmp_path / "runs/one")
    assert {str(tmp_path), str(tmp_path / "runs")} <= set(synced)  # the names of the folders that were made
    tmp_path /= "runs/one"
    # without the one no checkpoint is resumed; the other is written anew at each start
    assert {".config.json", ".metrics.jsonl"} <= {Path(path).name.rpartition(".")[0] for path in synced}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "metrics.jsonl", "metrics.csv", "status.json", "evaluation.json", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["precision"] == "float32"  # what auto became
    assert config["config"]["batch_size"] == 8
    assert {"jax", "flax", "python"} <= set(config["versions"])
    assert {"argv", "git", "device", "platform"} <= set(config)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["of"]) == ("done", 12, 12)
    values = log.read(tmp_path)
    assert {"train/loss", "train/accuracy", "train/learning_rate", "train/grad_norm", "perf/step_ms"} <= set(values[4])
    assert {"eval/loss", "eval/accuracy", "eval/ece"} <= set(values[12])
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert np.sum(evaluation["confusion"]) == 23


def test_a_finished_run_says_so_and_does_nothing(tmp_path):
    exp = tiny.mlp(**on(1))
    first = fit(exp, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    said = []
    again = train.fit(exp, tmp_path, say=said.append)
    assert any("already at step 12" in line for line in said)
    assert checkpoint.digest(again) == checkpoint.digest(first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_directory_is_refused_field_by_field(tmp_path):
    fit(tiny.mlp(**on(1)), tmp_path)
    with pytest.raises(BadInput, match="seed was 0 and is 7, batch_size was 8 and is 4"):
        fit(tiny.mlp(**on(1, seed=7, batch_size=4)), tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_a_run_goes_on_with_more_steps_another_log_period_or_mesh_only_where_that_is_meant(tmp_path):
    fit(tiny.mlp(**on(1)), tmp_path)
    longer = tiny.mlp(**on(2, steps=16, log_every=2))
    with pytest.raises(
        BadInput, match=r"steps was 12 and is 16, log_every was 4 and is 2, mesh_data was 1 and is 2; --allow_changes"
    ):
        fit(longer, tmp_path)
    assert int(fit(longer, tmp_path, allow_changes=True).step) == 16
    assert json.loads((tmp_path / "config.json").read_text())["config"]["steps"] == 16
    assert list(log.read(tmp_path)) == [4, 6, 8, 12, 14, 16]
    digest = log.read_status(tmp_path)["digest"]
    fit(tiny.mlp(**on(2, steps=8, log_every=2)), tmp_path, allow_changes=True)  # there is no way back
    assert {"step": 16, "digest": digest}.items() <= log.read_status(tmp_path).items()
    fit(longer, tmp_path, allow_changes=True)
    with pytest.raises(BadInput, match=r"seed was 0 and is 3; take another --workdir"):
        fit(tiny.mlp(**on(2, steps=16, log_every=2, seed=3)), tmp_path, allow_changes=True)


def test_other_code_or_data_under_the_same_config_are_refused_by_name(tmp_path):
    exp = tiny.mlp(**on(1))
    fit(exp, tmp_path)
    slower = optim.sgd(optim.warmup_cosine(0.01, exp.steps, 2), weight_decay=1e-4)
    other = {
        r"its data was 61 examples, \w+ and is 61 examples, \w+: ": {
            "train": memory.shuffled(tiny.arrays(61) | {"label": tiny.arrays(61)["label"][::-1]}, 8, 0)
        },
        r"its eval was 23 examples, \w+ and is 22 examples, \w+: ": {"eval": memory.in_order(tiny.arrays(22), 8)},
        r"its model was MLP\( .*dropout = 0\.1.* and is MLP\( .*dropout = 0\.2": {"model": MLP((16,), 3, dropout=0.2)},
        "its step computes otherwise .*optimizer": {"optimizer": slower},
        "its step computes otherwise": {"prepare": lambda batch, key, train: tiny.prepare(batch, key, False)},
    }
    before = (tmp_path / "config.json").read_bytes()
    for words, change in other.items():
        with pytest.raises(BadInput, match=f"holds a run of the same config, but {words}.*--allow_changes goes on"):
            fit(dataclasses.replace(exp, **change), tmp_path)
        assert (tmp_path / "config.json").read_bytes() == before
        assert log.read_status(tmp_path)["state"] == "done"
    changed = dataclasses.replace(exp, optimizer=slower)
    fit(changed, tmp_path, allow_changes=True)
    assert (tmp_path / "config.json").read_bytes() != before
    fit(changed, tmp_path)  # it is that run's from now on
    with pytest.raises(BadInput, match="its step computes otherwise"):
        fit(exp, tmp_path)


def test_other_devices_or_packages_are_told_and_the_code_is_compared_again_from_then_on(tmp_path):
    exp, said = tiny.mlp(**on(1)), []
    fit(exp, tmp_path)
    before, file = log.read_config(tmp_path), tmp_path / "config.json"
    left = before["fingerprint"] | {"step": "another"}
    del left["eval"]  # by an older version, which had none
    changes = {"devices": 7, "versions": before["versions"] | {"numpy": "0.1"}, "fingerprint": left}
    file.write_text(json.dumps(before | changes))
    train.fit(exp, tmp_path, say=said.append)
    (line,) = [line for line in said if "the bits may differ" in line]
    assert line.startswith(f"devices was 7 and is 1, numpy was 0.1 and is {np.__version__}: ")
    after = log.read_config(tmp_path)
    assert after | {"time": before["time"], "git": before["git"]} == before
    train.fit(exp, tmp_path, say=said.append)
    assert log.read_config(tmp_path) == after and sum("the bits may differ" in line for line in said) == 1
    slower = optim.sgd(optim.warmup_cosine(0.01, exp.steps, 2), weight_decay=1e-4)
    with pytest.raises(BadInput, match="its step computes otherwise"):
        fit(dataclasses.replace(exp, optimizer=slower), tmp_path)


def test_the_step_is_traced_once(tmp_path):
    traces = []

    def counted(name, function):
        def wrapped(*args):
            traces.append(name)
            return function(*args)

        return wrapped

    exp = tiny.mlp(**on(1))
    exp = dataclasses.replace(exp, loss=counted("loss", exp.loss), measure=counted("measure", exp.measure))
    fit(exp)
    assert traces == ["loss", "measure"]


def test_the_loop_sums_what_the_steps_counted():
    """Log periods that nothing divides, against a log of every step."""
    seen: dict[int, dict[int, dict]] = {1: {}, 5: {}}
    for every, rows in seen.items():
        fit(tiny.mlp(**on(1, log_every=every)), write=lambda at, v, rows=rows: rows.setdefault(at, {}).update(v))
    for end, start in ((5, 0), (10, 5), (12, 10)):
        mean = np.mean([seen[1][at]["train/loss"] for at in range(start + 1, end + 1)])
        assert seen[5][end]["train/loss"] == pytest.approx(mean, rel=1e-6)
        assert seen[5][end]["train/learning_rate"] == seen[1][end]["train/learning_rate"]


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        *[({}, 8), ({"log_every": 3}, 3), ({"eval_every": 5}, 5), ({"save_every": 2}, 2), ({"steps": 7}, 7)],
        ({"batch_size": 16}, 4),  # of which an epoch has four
    ],
)
def test_a_call_on_a_gpu_has_no_more_steps_than_a_period_has(fields, most):
    gpu: Any = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform="gpu")]), shape={"data": 1, "fsdp": 1}
    )
    exp = tiny.mlp(**({"steps": 100, "log_every": 50, "eval_every": 0} | fields))
    assert train.resolve(exp, gpu).config.steps_per_call == most
    assert train.resolve(exp, sharding.make_mesh(exp.config)).config.steps_per_call == 1


def test_several_steps_a_call_are_the_same_steps():
    exp = tiny.mlp(**on(1))
    one = fit(exp)
    several = fit(tiny.mlp(**on(1, steps_per_call=5)))  # 5, 5, and the 2 that remain one by one
    assert checkpoint.digest(one) == checkpoint.digest(several)


@pytest.mark.parametrize(
    # fsdp inside a rolled loop is left out: XLA deadlocks where devices share two cores
    "fields",
    [{"mesh_data": 2, "mesh_fsdp": 2}, {"mesh_data": 4, "steps_per_call": 5}],
    ids=["fsdp", "several steps a call"],
)
def test_all_of_it_at_once_resumes_to_the_same_bits(fields, tmp_path):
    """Accumulation, clipping and averages on four devices, broken between a log line and a save."""
    fields = {"accumulate": 2, "clip_norm": 1.0, "ema": 0.9} | fields
    exp = tiny.mlp(tiny.MLP((512,), 3), steps=23, log_every=3, save_every=4, eval_every=7, **fields)
    unbroken = fit(exp, tmp_path / "unbroken")
    with pytest.raises(Stop):
        fit(exp, tmp_path / "broken", write=stop_at(15))
    resumed = fit(exp, tmp_path / "broken")
    assert checkpoint.digest(resumed) == checkpoint.digest(unbroken)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "unbroken")


def test_a_loss_may_count_anything(tmp_path):
    """Metrics of every kind go through sums, checkpoints and a resume; the screen and the files get the floats."""
    plain = tiny.mlp(**on(1, log_every=5))

    def loss(outputs, batch):
        scalar, seen = plain.loss(outputs, batch)
        masked = batch | {"mask": jax.numpy.ones(len(outputs), bool)}
        return scalar, seen | {k: v for k, v in metrics.classification(outputs, masked).items() if k not in seen}

    exp = dataclasses.replace(plain, loss=loss)
    with pytest.raises(Stop):
        fit(exp, tmp_path, write=stop_at(7))
    fit(exp, tmp_path)
    assert 0 <= log.read(tmp_path)[10]["train/ece"] <= 1


def counting(name, factor=1.0):
    """The tiny MLP, saved within a log period, whose loss counts one thing more, of that name."""
    exp = tiny.mlp(**on(1, steps=15, log_every=6, save_every=4, eval_every=15))

    def loss(outputs, batch):
        scalar, seen = exp.loss(outputs, batch)
        return scalar, seen | {name: metrics.Mean.of(jax.numpy.full(len(outputs), factor))}

    return dataclasses.replace(exp, loss=loss)


@pytest.mark.parametrize("fewer", [False, True], ids=["one for another", "one more"])
def test_other_metrics_are_told_and_begin_a_log_period_of_their_own_where_that_is_meant(fewer, tmp_path):
    old, new = tiny.mlp(**on(1, steps=15, log_every=6, save_every=4, eval_every=15)), counting("new", 2.0)
    with pytest.raises(Stop):
        fit(old if fewer else counting("old"), tmp_path, write=stop_at(9))  # saved at 8; from 7 on a log period
    with pytest.raises(BadInput, match="holds a run of the same config, but its step computes otherwise"):
        fit(new, tmp_path)
    said = []
    train.fit(new, tmp_path, say=said.append, allow_changes=True)
    assert any("counts other metrics" in line for line in said)
    assert log.read(tmp_path)[12]["train/new"] == 2.0 and "train/old" not in log.read(tmp_path)[12]


def test_sums_of_before_they_had_names_are_carried_on(tmp_path):
    exp = tiny.mlp(mesh_data=1)
    mesh = sharding.make_mesh(exp.config)
    program, said = train.compile(train.resolve(exp, mesh), mesh), []
    leaves = checkpoint.named(program.sums())
    saved = [float(i) for i, _ in enumerate(leaves)]
    assert [float(x) for x in jax.tree.leaves(train.carry(program, saved, said.append))] == saved and not said
    empty = train.carry(program, saved[1:], said.append)
    assert not any(float(x) for x in jax.tree.leaves(empty)) and said


def test_parameters_spoiled_by_the_last_step_are_not_saved(tmp_path):
    def train_step(exp, state, batch):
        new, seen = train.step.train_step(exp, state, batch)
        scale = jax.numpy.where(state.step == 11, jax.numpy.nan, 1.0)
        return new.replace(params=jax.tree.map(lambda p: p * scale, new.params)), seen

    with pytest.raises(train.NonFinite, match="step 12"):
        fit(dataclasses.replace(tiny.mlp(**on(1)), train_step=train_step), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]
    assert checkpoint.steps(tmp_path / "nonfinite") == [12]  # for --mode=replay, which the message advises


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"best": ("top1", "max")}, "top1.*counts accuracy"),
        ({"config": core.Run(precision="float64", batch_size=8)}, "jax_enable_x64"),
    ],
)
def test_an_experiment_that_cannot_work_is_told_before_it_runs(change, named):
    with pytest.raises(BadInput, match=named):
        fit(dataclasses.replace(tiny.mlp(**on(1)), **change))


def test_a_directory_of_another_experiment_is_refused(tmp_path):
    class Other(core.Run):
        pass

    fit(tiny.mlp(**on(1)), tmp_path)
    exp = tiny.mlp(**on(1))
    with pytest.raises(BadInput, match="holds a run of core, not of test_train"):
        fit(dataclasses.replace(exp, config=Other(**dataclasses.asdict(exp.config))), tmp_path)


def losses(exp) -> list[float]:
    seen = {}
    fit(exp, write=lambda at, v: seen.update({at: v["train/loss"]} if "train/loss" in v else {}))
    return [seen[at] for at in sorted(seen)]


@pytest.mark.parametrize(
    ("make", "precision", "steps", "tolerance", "mesh"),
    [
        (tiny.mlp, "float64", 20, 1e-12, {"mesh_data": 4}),
        (tiny.resnet, "float64", 20, 1e-12, {"mesh_data": 4}),
        (tiny.mlp, "float32", 20, 1e-6, {"mesh_data": 4}),
        (tiny.resnet, "float32", 1, 1e-6, {"mesh_data": 4}),  # what follows is chaos: docs/scaling.md
        (partial(tiny.mlp, tiny.MLP((512,), 3)), "float64", 20, 1e-12, {"mesh_data": 2, "mesh_fsdp": 2}),
    ],
    ids=["mlp-f64", "resnet-f64", "mlp-f32", "resnet-f32", "fsdp-f64"],
)
def test_four_devices_equal_one(make, precision, steps, tolerance, mesh):
    fields = {"steps": steps, "log_every": 1, "precision": precision, "eval_every": steps}
    with jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext():
        one, four = losses(make(mesh_data=1, **fields)), losses(make(**mesh, **fields))
    assert len(one) == steps
    np.testing.assert_allclose(four, one, rtol=tolerance)


def test_evaluation_counts_every_example_once_on_any_batch_and_mesh():
    """23 examples in batches of 1, 8 and 23 on one device and 4."""
    results = []
    for devices, rows in ((1, 1), (1, 8), (4, 8), (4, 23)):
        exp = tiny.mlp(**on(devices))
        exp = dataclasses.replace(exp, eval=exp.eval.with_batch_size(rows))
        mesh = sharding.make_mesh(exp.config)
        program = train.compile(train.resolve(exp, mesh), mesh)
        results.append(train.evaluate(program, program.init()))
    assert results[0]["confusion"].sum() == 23
    for other in results[1:]:
        np.testing.assert_array_equal(other["confusion"], results[0]["confusion"])
        for name in ("loss", "accuracy", "ece"):
            assert other[name] == pytest.approx(results[0][name], rel=1e-5)


def test_a_mean_over_no_example_is_left_out_and_ends_no_run(tmp_path):
    def measure(outputs, batch):
        rare = batch["mask"] & (batch["label"] > 99)
        return metrics.classification(outputs, batch) | {"rare": metrics.Mean.of(outputs[:, 0], rare)}

    fit(dataclasses.replace(tiny.mlp(**on(1)), measure=measure), tmp_path)
    assert {tag for tag in log.read(tmp_path)[12] if "eval" in tag} == {"eval/loss", "eval/accuracy", "eval/ece"}


def test_the_best_checkpoint_is_kept_and_evaluated(tmp_path):
    exp = tiny.mlp(**on(1, steps=24, eval_every=4, keep_last=1, keep_best=1))
    fit(exp, tmp_path)
    values = log.read(tmp_path)
    scores = {step: row["eval/accuracy"] for step, row in values.items() if "eval/accuracy" in row}
    best = max(scores, key=lambda step: (scores[step], step))
    assert checkpoint.steps(tmp_path / "checkpoints") == sorted({best, 24})
    assert train.evaluate_checkpoint(exp, tmp_path, quiet)["accuracy"] == scores[best]
    before, said = (tmp_path / "evaluation.json").read_bytes(), []
    (tmp_path / f".evaluation.json.{os.getpid()}").mkdir()  # as in a folder that cannot be written
    assert train.evaluate_checkpoint(exp, tmp_path, said.append)["step"] == best
    assert "not left there" in said[-1]
    assert (tmp_path / "evaluation.json").read_bytes() == before
    with pytest.raises(BadInput, match="no checkpoint"):
        train.evaluate_checkpoint(exp, tmp_path / "nothing", quiet)


def test_an_evaluation_by_other_code_or_data_than_the_runs_says_so(tmp_path):
    exp = tiny.mlp(**on(1))
    fit(exp, tmp_path)
    other = {
        "its eval was 23 examples": {"eval": memory.in_order(tiny.arrays(22), 8)},
        "its step computes otherwise": {"prepare": lambda batch, key, train: tiny.prepare(batch, key, False)},
    }
    for words, change in other.items():
        said = []
        train.evaluate_checkpoint(dataclasses.replace(exp, **change), tmp_path, said.append)
        assert words in said[0] and "what follows is of what there is now" in said[0]
    said = []
    train.evaluate_checkpoint(exp, tmp_path, said.append)
    assert len(said) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_a_log_whose_checkpoints_are_gone_is_kept_aside_where_there_were_any(saved, tmp_path):
    with pytest.raises(Stop):
        fit(tiny.mlp(**on(1)), tmp_path, write=stop_at(8 if saved else 5))  # saved at 6; the log has 4 and maybe 6
    log.status(tmp_path, "running", step=log.read_status(tmp_path)["step"], of=12)  # as SIGKILL would leave it
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    said = []
    train.fit(tiny.mlp(**on(1)), tmp_path, say=said.append)
    kept = [path.read_bytes() for path in tmp_path.glob("metrics-*.jsonl")]
    assert kept == ([before] if saved else [])
    assert any("begun anew, its log kept as" in line for line in said) == saved
    assert list(log.read(tmp_path)) == [4, 6, 8, 12]


@pytest.mark.parametrize(
    ("bad", "fields", "words", "kept"),
    [
        (float("nan"), {"save_every": 2}, "step 8: the loss or the gradient", 6),
        (float("inf"), {"save_every": 2}, "step 8: the loss or the gradient", 6),
        (float("nan"), {"save_every": 2, "steps_per_call": 4}, "step 8: the loss or the gradient", 4),
        (float("inf"), {"save_every": 1}, "step 7: the update", 6),  # which keeps what it left from being saved
    ],
)
def test_what_is_not_finite_ends_the_run_at_its_step(bad, fields, words, kept, tmp_path):
    """Step 7 spoils the parameters, step 8 meets them."""
    exp = tiny.mlp(**on(1, steps=32, log_every=4, keep_last=1, keep_best=0, **fields))

    def train_step(exp, state, batch):
        new, seen = train.step.train_step(exp, state, batch)
        scale = jax.numpy.where(state.step == 6, bad, 1.0)
        return new.replace(params=jax.tree.map(lambda p: p * scale, new.params)), seen

    with pytest.raises(train.NonFinite, match=words):
        fit(dataclasses.replace(exp, train_step=train_step), tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert words in status["message"]
    assert checkpoint.steps(tmp_path / "checkpoints") == [kept]


def test_a_save_that_fails_while_another_error_ends_the_run_is_told_with_it(tmp_path, monkeypatch):
    def stuck(folder, *rest, written=checkpoint._write):
        if folder.parent.name == "nonfinite":
            return written(folder, *rest)
        time.sleep(0.5)  # the loop is past its end by then
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write", stuck)
    exp = dataclasses.replace(tiny.mlp(**on(1, save_every=1)), optimizer=optax.sgd(1e30))
    with pytest.raises(train.NonFinite) as caught:  # step 1 gives parameters that step 2 overflows by
        fit(exp, tmp_path)
    words = f"step 2: the loss or the gradient is not finite; step 1 was not saved in {tmp_path / 'checkpoints'}; "
    assert line_of(caught.value).startswith(words) and "No space left" in line_of(caught.value)
    assert log.read_status(tmp_path)["message"] == line_of(caught.value)
    assert not checkpoint.steps(tmp_path / "checkpoints")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_the_same_call_goes_on(signum, tmp_path):
    if signum == signal.SIGHUP:
        signal.signal(signum, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    exp = tiny.mlp(**on(1))
    whole = fit(exp)

    def write(at: int, values: dict) -> None:
        if at == 7:
            os.kill(os.getpid(), signum)

    with pytest.raises(train.Preempted) as stopped:
        fit(exp, tmp_path, write=write)
    assert stopped.value.signum == signum
    at = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert 7 <= at <= 8
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    assert checkpoint.digest(fit(exp, tmp_path)) == checkpoint.digest(whole)


@pytest.mark.parametrize("at", [4, 12])
def test_a_signal_in_an_evaluation_breaks_it_off_and_the_same_call_owes_it(at, tmp_path):
    """What is written at 4 and 12 comes right before the evaluations of 6 and 12, the last step."""
    exp = tiny.mlp(**on(1))
    whole = fit(exp, tmp_path / "whole")

    def write(reached: int, values: dict) -> None:
        if reached == at and values:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Preempted, match="saved"):
        fit(exp, tmp_path / "broken", write=write)
    stopped = checkpoint.manifest(tmp_path / "broken/checkpoints", 6 if at == 4 else 12)
    assert stopped["extra"]["owed"] and not stopped["metrics"]
    assert log.read_status(tmp_path / "broken")["digest"] == stopped["digest"]
    assert checkpoint.digest(fit(exp, tmp_path / "broken")) == checkpoint.digest(whole)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")
    statuses = [log.read_status(tmp_path / run) for run in ("whole", "broken")]
    assert [status["state"] for status in statuses] == ["done", "done"]
    assert statuses[0]["digest"] == statuses[1]["digest"] == checkpoint.digest(whole)  # two runs, compared by one line


def test_more_signals_while_it_saves_lose_nothing(tmp_path, monkeypatch):
    written = checkpoint._write

    def write_while_they_come(*args) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
        written(*args)

    monkeypatch.setattr(checkpoint, "_write", write_while_they_come)
    with pytest.raises(train.Preempted) as stopped:
        fit(tiny.mlp(**on(1)), tmp_path, write=lambda at, values: os.kill(os.getpid(), signal.SIGINT))
    assert stopped.value.signum == signal.SIGINT
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]  # told of 1, with 2 under way


@pytest.mark.parametrize("moment", ["announce", "compile"])
def test_a_signal_before_the_first_step_ends_the_run_before_it(moment, tmp_path, monkeypatch):
    real = getattr(train, moment)

    def disturbed(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, moment, disturbed)
    with pytest.raises(train.Preempted, match=r"step 0$"):
        fit(tiny.mlp(**on(1)), tmp_path)
    assert log.read_status(tmp_path)["state"] == "preempted" and not checkpoint.steps(tmp_path / "checkpoints")
    monkeypatch.undo()
    assert int(fit(tiny.mlp(**on(1)), tmp_path).step) == 12


@pytest.mark.parametrize(("step_seconds", "most"), [(4.0, 1), (0.3, 3), (0.001, 1000)])
def test_what_is_in_flight_is_bounded_by_time(step_seconds, most, monkeypatch):
    """On a device of its own clock, with a host that takes no time: at most a second of work, or a call."""
    now, queue, longest = [0.0], [0], [0]

    def wait(_) -> None:
        now[0] += queue[0] * step_seconds + 1e-6
        queue[0] = 0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(jax, "block_until_ready", wait)
    ahead = train.Ahead(1.0)
    for _ in range(5000):
        ahead.hold(None)
        queue[0] += 1
        longest[0] = max(longest[0], queue[0])
    assert most - 1 <= longest[0] <= most


def test_several_cpu_devices_are_given_few_calls_at_a_time(monkeypatch):
    """With more than 32 in flight their collectives wait for one another for ever."""
    waited, ahead = [], train.Ahead(1e9, train.in_flight(sharding.make_mesh(tiny.mlp(mesh_data=2).config)))
    monkeypatch.setattr(jax, "block_until_ready", lambda newest: waited.append(newest))
    for call in range(100):
        ahead.hold(call)
    assert waited == [1, *range(17, 100, 16)]
    assert train.in_flight(sharding.make_mesh(tiny.mlp(mesh_data=1).config)) is None


def test_it_runs_in_a_thread_too():
    """Where signal handlers can't be set, as in some notebooks."""
    states = []
    thread = threading.Thread(target=lambda: states.append(fit(tiny.mlp(**on(1, steps=2)))))
    thread.start()
    thread.join()
    assert int(states[0].step) == 2


def test_what_is_announced():
    said = []
    train.fit(tiny.mlp(**on(1, steps=2)), say=said.append)
    text = "\n".join(said)
    for word in ("Dense_0", "36x16", "643", "cpu", "float32", "2 steps of 8", "FLOP", "compiled in"):
        assert word in text


def test_a_run_so_long_that_its_order_would_start_over_is_refused():
    with pytest.raises(BadInput, match=r"take 536,870,912 steps at most"):
        fit(tiny.mlp(**on(1, steps=2**29 + 1)))


def test_a_log_period_so_long_that_its_count_would_overflow_is_refused():
    fits = tiny.mlp(**on(1, steps=2**28, log_every=2**28 - 1))
    assert train.resolve(fits, sharding.make_mesh(fits.config))
    with pytest.raises(BadInput, match=r"log_every=268435456: .* take 268,435,455 at most"):
        fit(tiny.mlp(**on(1, steps=2**28, log_every=2**28)))


@dataclasses.dataclass(frozen=True)
class Drifting:
    """A source whose batches are changed from a step on."""

    source: core.Source
    change: Any
    resident: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def like(self) -> dict[str, np.ndarray]:
        return self.feed(0)

    def feed(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        rows = (self.batch_size * step + np.arange(self.batch_size)) % self.size
        batch = {name: array[rows] for name, array in self.source.feed(0).items()}
        return self.change(batch) if step >= 5 else batch

    def batch(self, feed, step):
        return feed

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda b: {k: v[:7] for k, v in b.items()},
            r"image was uint8 \[8, 6, 6, 1\] and is uint8 \[7, 6, 6, 1\]; label",
        ),
        (
            lambda b: b | {"image": b["image"].astype(np.float32)},
            r"image was uint8 \[8.* and is float32 \[8, 6, 6, 1\];",
        ),
        (lambda b: b | {"weight": b["label"]}, r"weight was None and is int32 \[8\];"),
    ],
    ids=["shape", "dtype", "another array"],
)
def test_a_batch_that_would_compile_the_step_anew_is_named(change, words, tmp_path):
    exp = tiny.mlp(mesh_data=1)
    exp = dataclasses.replace(exp, train=Drifting(exp.train, change))
    with pytest.raises(train.Recompile, match=f"^the batch of step 5 would compile the step anew: {words}"):
        fit(exp, tmp_path)
    assert log.read_status(tmp_path)["state"] == "failed"


def test_the_logs_tell_whether_the_device_waits_for_data_or_the_data_for_the_device():
    def nap(x):
        time.sleep(0.1)
        return x

    def slow_step(batch, key, train):
        label = batch["label"]
        label = jax.pure_callback(nap, label, label, vmap_method="sequential") if train else label
        return exp.prepare(batch | {"label": label}, key, train)

    exp = tiny.mlp(mesh_data=1, steps=15, log_every=5, eval_every=9)  # what is logged at 10 is of a step
    slow_source = dataclasses.replace(exp, train=Drifting(exp.train, nap))
    slow_device = dataclasses.replace(exp, train=Drifting(exp.train, lambda batch: batch), prepare=slow_step)
    for slow, least, most in ((slow_source, 0.7, 1.0), (slow_device, 0.0, 0.3)):
        told: list[dict[str, float]] = []
        fit(slow, write=lambda at, values, told=told: told.append(values))
        waits = [values["perf/data_wait_frac"] for values in told if "perf/data_wait_frac" in values]
        assert len(waits) == 3 and least <= waits[-1] and max(waits) <= most, waits


def test_a_run_outlives_a_field_that_the_code_has_gained_or_lost_where_that_is_meant(tmp_path):
    fit(tiny.mlp(**on(1)), tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["config"]["deterministic"]
    file.write_text(json.dumps(saved | {"config": saved["config"] | {"bygone": 3}}))
    with pytest.raises(BadInput, match=r"deterministic was None .*, bygone was 3 .*; --allow_changes"):
        fit(tiny.mlp(**on(1)), tmp_path)
    assert int(fit(tiny.mlp(**on(1)), tmp_path, allow_changes=True).step) == 12


@pytest.mark.parametrize("steps_per_call", [0, 2])
def test_no_convolution_is_in_a_loop_on_the_cpu_unless_asked_for(steps_per_call):
    """In a rolled loop over steps XLA:CPU takes a convolution's gradient some 30 times as long, unless it is ours."""
    exp = tiny.resnet(steps_per_call=steps_per_call, mesh_data=1)
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    text = program.steps(program.exp.config.steps_per_call).as_text()  # pyright: ignore
    computations = {block.split(" ", 1)[0]: block for block in re.split(r"\n(?=%|ENTRY)", text)}
    bodies = [computations[name] for name in re.findall(r"body=(%[\w.-]+)", text)]
    assert any(" convolution(" in body for body in bodies) == (steps_per_call == 2)

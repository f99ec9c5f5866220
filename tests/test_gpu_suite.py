"""The GPU suite on the CPU: a stage leaves its figures, is not run twice, a failure is told, and CIFAR-10 travels."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import gpu, pack_cifar
from jaxcompute.data import sources
from jaxcompute.errors import BadInput

ROOT = Path(__file__).parents[1]


def test_a_stage_leaves_its_figures_and_is_not_run_twice(tmp_path):
    back = tmp_path / "back"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--stages=restore"]
    command += [f"--out={tmp_path}", f"--back={back}"]
    said = [subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout for _ in range(2)]
    found = json.loads((back / "summary.json").read_text())["stages"]["restore"]
    assert found["state"] == "done", found
    rows = found["rows"]
    assert {row["what"].partition(":")[0] for row in rows} == {"tiny", "tiny_resnet"}
    assert all(row["holds"] for row in rows), rows
    assert "restore: done after" in said[0]
    assert said[1].startswith("restore: done before\n")
    assert "parameters and all of State" in (back / "summary.txt").read_text()


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The suite's own loop, its stages in this process."""
    monkeypatch.setattr(gpu, "ended", lambda name, given, seconds: gpu.one(name, given))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # and is put back, as is the folder of data
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "")
    monkeypatch.setenv("JAXCOMPUTE_DATA_DIR", str(tmp_path / "nothing"))
    given = argparse.Namespace(out=tmp_path, limit_s=1000.0, pieces=None, back=None, tiny=False)

    def run(stages: dict[str, gpu.Stage], **fields) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr(gpu, "STAGES", stages)
        gpu.suite(list(stages), argparse.Namespace(**vars(given) | fields))
        told = json.loads((tmp_path / "summary.json").read_text())["stages"]
        return {name: (found["state"], found["why"]) for name, found in told.items()}

    return run


def ill(out, tiny):
    raise ValueError("no such kernel")


def well(out, tiny):
    return {"rows": [("a figure", 1.5, "ms")], "more": [1]}


def ends(out, tiny):
    sys.exit("computes something else")


def test_a_stage_that_fails_is_told_and_the_next_begins(suite, tmp_path, capsys):
    stages = {"ill": gpu.Stage(ill, 1), "ends": gpu.Stage(ends, 1), "well": gpu.Stage(well, 1)}
    assert suite(stages) == {
        "ill": ("failed", "ValueError: no such kernel"),
        "ends": ("failed", "SystemExit: computes something else"),
        "well": ("done", ""),
    }
    assert 'raise ValueError("no such kernel")' in capsys.readouterr().err  # its log
    table = (tmp_path / "summary.txt").read_text()
    assert "no such kernel" in table
    assert "a figure" in table
    # mended, it is run again, and the one that is done is not, unless it was tiny
    assert suite({"ill": gpu.Stage(well, 1), "well": gpu.Stage(ill, 1)}) == {"ill": ("done", ""), "well": ("done", "")}
    assert suite({"well": gpu.Stage(ill, 1)}, tiny=True)["well"][0] == "failed"


def test_figures_outlast_a_shorter_run_and_a_goal_is_missed_until_it_is_measured(suite, tmp_path, monkeypatch):
    def broken(out, tiny, figures=2, ill=True):
        goals = [gpu.stages.at_least(9, f"figure {i}", i) for i in range(3)]
        gpu.stages.promise(out, *goals)
        gpu.stages.keep(out, goals[:figures], seen=figures)
        if ill:
            raise ValueError("no such kernel")
        return {"rows": []}

    def rows() -> list:
        return [row["value"] for row in json.loads((tmp_path / "broken/told.json").read_text())["rows"]]

    suite({"broken": gpu.Stage(broken, 1)})
    assert rows() == [0, 1, "not run"]
    assert suite({"broken": gpu.Stage(partial(broken, figures=0), 1)})["broken"][0] == "failed"
    assert rows() == [0, 1, "not run"]
    missed = [line for line in (tmp_path / "summary.txt").read_text().splitlines() if "figure 2" in line]
    assert missed[0].split()[-1] == "NO"
    assert suite({"broken": gpu.Stage(partial(broken, figures=3, ill=False), 1)})["broken"][0] == "done"
    assert rows() == [0, 1, 2]
    # what was done on another chip is done again, and none of its figures stay
    monkeypatch.setattr(gpu, "this_machine", lambda: {"chips": ["another"], "driver": "", "packages": {}})
    suite({"broken": gpu.Stage(partial(broken, figures=1), 1)})
    assert rows() == [0, "not run", "not run"]


def test_what_has_no_time_or_no_data_is_not_begun(suite, tmp_path, capsys, monkeypatch):
    made = []

    def make_up(folder: Path) -> None:
        made.append(folder)
        (folder / "jaxcompute").mkdir(parents=True)
        (folder / "jaxcompute/cifar10.npz").touch()

    monkeypatch.setattr(pack_cifar, "make_up", make_up)
    stages = {"long": gpu.Stage(well, 2000), "real": gpu.Stage(well, 1, "real"), "any": gpu.Stage(well, 1, "any")}
    told = suite(stages, pieces=tmp_path)
    assert told.keys() == {"real", "any"}
    assert told["real"] == ("left out", "CIFAR-10 is not here: bring both pieces, --pieces=DIR")
    assert told["any"][0] == "done"
    said = capsys.readouterr().out
    assert "long   not begun" in (tmp_path / "summary.txt").read_text()
    assert "long: not begun, as it takes some 2000 s and 1000 s are left" in said
    assert "has no cifar10-0.npz and no cifar10-1.npz" in said
    monkeypatch.setenv("JAXCOMPUTE_DATA_DIR", str(tmp_path / "nothing"))  # as a new process sees it
    suite(stages)
    assert made == [tmp_path / "made_up"]  # once
    assert "CIFAR-10's images made up for any\n" in (tmp_path / "summary.txt").read_text()


def test_a_stage_has_three_times_its_seconds_or_what_is_left_and_at_most_eight_minutes(suite, monkeypatch):
    allowed = []
    monkeypatch.setattr(gpu, "begin", lambda name, given, seconds: allowed.append(seconds))
    suite({"well": gpu.Stage(well, 10)}, limit_s=float("inf"))
    suite({"well": gpu.Stage(well, 10)}, limit_s=20.0)
    suite({"well": gpu.Stage(well, 200)}, limit_s=1000.0)
    assert allowed[0] == 30
    assert 10 < allowed[1] <= 20
    assert allowed[2] == 480


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    script, pid, figures = (tmp_path / name for name in ("stage.sh", "pid", "figures"))
    row = gpu.stages.Row("a point", 2.5)._asdict()
    figures.write_text(json.dumps({"state": "begun", "rows": [row]}))
    script.write_text(f"sleep 600 &\necho $! > {pid}\ncp {figures} {tmp_path}/correct/told.json\nwait\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which starts at once on a busy machine too
    given = argparse.Namespace(out=tmp_path, tiny=True)
    gpu.begin("correct", given, 5.0)
    told = gpu.told(given, "correct")
    assert (told["state"], told["why"], told["rows"]) == ("failed", "it took more than 5 s", [row])
    gone(int(pid.read_text()))


def test_a_suite_that_is_killed_takes_its_stage_along():
    # asked for its parent before the pid is told, as that may be killed at once
    child = "import os; from benchmarks import gpu; suite = os.getppid(); print(os.getpid(), flush=True); "
    child += "gpu.end_with(suite)"
    shell = ["/bin/sh", "-c", f'setsid "{sys.executable}" -c "{child}" & wait']
    with subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True) as suite:
        assert suite.stdout
        pid = int(suite.stdout.readline())
        assert runs(pid)
        suite.kill()
        gone(pid)


def gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while runs(pid):
        assert time.monotonic() < deadline, "what it started still runs"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


SIZES = {"train": 230, "test": 71}


@pytest.fixture
def small(monkeypatch) -> sources.Dataset:
    """CIFAR-10 of a few hundred smooth images, which `sources.load` takes for whole."""
    published = dataclasses.replace(sources._SETS["cifar10"], sizes=SIZES)
    monkeypatch.setitem(sources._SETS, "cifar10", published)
    random = np.random.default_rng(0)
    splits = {
        split: {
            "image": random.integers(0, 256, (size, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2),
            "label": random.integers(0, 10, size, np.int32),
        }
        for split, size in SIZES.items()
    }
    return sources.Dataset("cifar10", **splits, classes=tuple("abcdefghij"))


def test_cifar_travels_in_two_pieces_and_needs_neither_tfds_nor_grain(small, tmp_path, monkeypatch):
    for name in ("tensorflow_datasets", "grain", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    monkeypatch.setattr(pack_cifar, "TILES", 10)  # so that a piece has several mosaics
    pieces = pack_cifar.pack(small, tmp_path / "pieces")
    assert [piece.name for piece in pieces] == [*pack_cifar.NAMES]
    assert sum(piece.stat().st_size for piece in pieces) < small.train["image"].nbytes / 4
    pack_cifar.place(tmp_path / "pieces", tmp_path / "data")
    loaded = sources.load("cifar10", tmp_path / "data")
    assert loaded.classes == small.classes
    for split in SIZES:
        for key in ("image", "label"):
            np.testing.assert_array_equal(getattr(loaded, split)[key], getattr(small, split)[key])


def test_a_piece_that_is_missing_or_of_another_set_is_refused(small, tmp_path):
    pieces = pack_cifar.pack(small, tmp_path / "pieces")
    other = dataclasses.replace(small, test={**small.test, "image": 255 - small.test["image"]})
    pack_cifar.pack(other, tmp_path / "others")
    (tmp_path / "others" / pieces[1].name).replace(pieces[1])
    with pytest.raises(BadInput, match="test image came out other than packed"):
        pack_cifar.unpack(tmp_path / "pieces")
    pack_cifar.pack(dataclasses.replace(small, classes=tuple("abcdefghji")), tmp_path / "others")
    (tmp_path / "others" / pieces[1].name).replace(pieces[1])
    with pytest.raises(BadInput, match="classes came out other than packed"):
        pack_cifar.unpack(tmp_path / "pieces")
    np.savez(pieces[1], image=np.zeros(3), side=8)
    with pytest.raises(BadInput, match=r"cifar10-1\.npz is no piece, as it has no classes, count, digests, mosaic_00"):
        pack_cifar.unpack(tmp_path / "pieces")
    pieces[1].write_bytes(pieces[1].read_bytes()[:100])
    with pytest.raises(BadInput, match=r"cifar10-1\.npz is damaged"):
        pack_cifar.unpack(tmp_path / "pieces")
    pieces[0].unlink()
    with pytest.raises(BadInput, match=r"has no cifar10-0\.npz; bring both"):
        pack_cifar.unpack(tmp_path / "pieces")


def test_the_speedruns_peer_takes_the_same_steps():
    """In float64, as Muon makes rounding's part of a gradient as large as others: in float32 kernels are 5 % apart."""
    torch = pytest.importorskip("torch")
    from benchmarks import speedrun_torch as peer
    from experiments import cifar_speedrun as ours
    from jaxcompute import losses

    rows, steps, whitening_steps, widths = 16, 20, 6, (8, 16, 16)
    config = ours.Config(batch_size=rows, epochs=10.0, steps=steps, whitening_epochs=3.0)
    random = np.random.default_rng(0)
    image, label = random.normal(size=(rows, 32, 32, 3)), random.integers(0, 10, rows)
    pixels = random.integers(0, 256, (100, 8, 8, 3), np.uint8)
    model, loss = ours.Net(ours.whitening(pixels), widths), losses.cross_entropy(config.label_smoothing)
    variables = jax.device_get(model.init(jax.random.key(0), jnp.asarray(image, jnp.float32)))

    def tensor(array, *axes):
        return torch.from_numpy(np.array(array, np.float64).transpose(axes).copy())

    net = peer.Net(tensor(variables["whitening"]["kernel"], 3, 2, 0, 1), widths).double()
    for i, conv in enumerate(net.convs):
        conv.weight.data = tensor(variables["params"][f"Conv_{i}"]["kernel"], 3, 2, 0, 1)
    net.head.weight.data = tensor(variables["params"]["Dense_0"]["kernel"], 1, 0)
    muon, sgd = peer.optimizers(net, config, peer.orthogonal)

    with jax.enable_x64(True):
        params, mutable = (
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
            for tree in (variables["params"], {name: x for name, x in variables.items() if name != "params"})
        )
        schedule = optax.linear_schedule(config.learning_rate, 0, steps)
        optimizer = ours.optimizer(config, steps, schedule, whitening_steps)
        opt_state = optimizer.init(params)

        @jax.jit
        def step(params, opt_state):
            def of(params):
                logits, _ = model.apply({"params": params, **mutable}, image, train=True, mutable=["batch_stats"])
                return loss(logits, {"label": jnp.asarray(label)})[0]

            value, gradient = jax.value_and_grad(of)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return value, optax.apply_updates(params, updates), opt_state

        found, wanted = [], []
        for at in range(8):
            value, params, opt_state = step(params, opt_state)
            wanted.append(float(value))
            logits = net(tensor(image, 0, 3, 1, 2), at < whitening_steps)
            total = peer.loss_of(logits, torch.from_numpy(label), config)
            peer.learn(total, muon, sgd, at, steps)
            found.append(total.item() / rows)
        params = jax.device_get(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    pairs = {
        "whitening_bias": (net.whitening_bias, params["whitening_bias"]),
        "head": (net.head.weight.T, params["Dense_0"]["kernel"]),
    }
    for i, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
        pairs[f"kernel {i}"] = conv.weight.permute(2, 3, 1, 0), params[f"Conv_{i}"]["kernel"]
        pairs[f"bias {i}"] = norm.bias, params[f"BatchNorm_{i}"]["bias"]
    apart = {name: np.linalg.norm(a.detach().numpy() - b) / np.linalg.norm(b) for name, (a, b) in pairs.items()}
    assert max(apart.values()) < 5e-3, apart


def test_whole_trainings_tell_their_accuracy_and_begin_anew(tmp_path, monkeypatch):
    seen = []

    def launched(*flags):
        workdir = Path(flags[-1].removeprefix("--workdir="))
        assert not workdir.exists()
        workdir.mkdir(parents=True)
        accuracy = 0.96 if "--config.depth=18" in flags else 0.919
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 9, "time": 0.0, "eval/accuracy": accuracy}) + "\n")
        seen.append(flags)
        return 0, ""

    monkeypatch.setattr(gpu.stages, "launched", launched)
    for depth in (18, 18, 20, 20):
        row, _ = gpu.stages.training(tmp_path, tiny=False, depth=depth)["rows"]
        assert (row.value, row.holds) == ((0.96, True) if depth == 18 else (0.919, False))
    assert len(seen) == 4


def test_a_comparison_that_is_ended_keeps_its_timings_and_goes_on_with_the_works_that_are_left(tmp_path, monkeypatch):
    from benchmarks import side_by_side
    from jaxcompute.compute import benchmark

    def timing(name: str, who: str, ratio: float) -> side_by_side.Timing:
        told = {"work": name, "job": "train", "who": who, "ms": 4.0, "ratio": ratio}
        return side_by_side.Timing(**dict.fromkeys(side_by_side.Timing._fields, 0.0) | told)

    begun = []

    def compare(name, options, differs, keep):
        begun.append(name)
        timings = [timing(name, "ours", 1.0), timing(name, "torch.compile", 1.5)]
        keep(timings)
        if begun.count(name) == 1 and name == "tiny_resnet":
            raise MemoryError
        return timings

    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # and is put back
    monkeypatch.setattr(side_by_side, "compare", compare)
    monkeypatch.setattr(side_by_side, "picture", lambda timings, title, file: file.write_text(str(len(timings))))
    monkeypatch.setattr(benchmark, "roofs", lambda: benchmark.Roofs({"float32": 1e12}, 1e9, ""))
    compared = partial(gpu.stages.peers, tmp_path, False, works="tiny,tiny_resnet", precisions="float32", goal=1.2)
    with pytest.raises(MemoryError):
        compared()
    rows = {row["what"]: row["value"] for row in gpu.stages.kept(tmp_path)["rows"]}
    assert rows["tiny_resnet, float32, train: ours"] == 2000
    assert rows["tiny_resnet, float32, train: over torch.compile"] == 1.5
    compared()
    assert begun == ["tiny", "tiny_resnet", "tiny_resnet"]
    lost = [row for row in gpu.stages.kept(tmp_path)["rows"] if row["what"] == "tiny, float32: left out, see the log"]
    assert [(row["value"], row["holds"]) for row in lost] == [("linen, torch eager", False)]
    assert (tmp_path / "side-by-side.png").read_text() == "4"


def test_layers_that_differ_are_told_beside_the_figures_of_the_others(tmp_path, monkeypatch):
    from benchmarks import layers

    def compare(precisions, rounds, seconds, tiny, differs):
        for name in "ab":
            yield layers.Timing(name, "both", "float32", 1.0, 2.0, 0.5, 0.5, 0.5)
            differs(f"{name} differs")
            assert len(gpu.stages.kept(tmp_path)["facts"]["timings"]) == "ab".index(name) + 1  # whatever comes next

    monkeypatch.setattr(layers, "compare", compare)
    (row,) = gpu.stages.layers(tmp_path, tiny=True)["rows"]
    assert (row.value, row.holds) == ("a differs, b differs", False)
    rows = {row["what"]: row["value"] for row in gpu.stages.kept(tmp_path)["rows"]}
    assert rows == {f"{name}, both, float32: of the other's time": 0.5 for name in "ab"}


def test_a_sweep_whose_time_is_up_goes_on_where_it_was(tmp_path, monkeypatch):
    from jaxcompute.compute import benchmark

    took = []

    def measure(exp, setting, roofs, seconds):
        took.append((setting.precision, setting.steps_per_call))
        time.sleep(0.5)
        return benchmark.Point(setting, 1.0, 0.0, 100.0, *[None] * 7)

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(gpu.stages.Unfinished, match="1 of 2 points are left"):
        gpu.stages.sweep(tmp_path, tiny=True, seconds=0.5)
    gpu.stages.sweep(tmp_path, tiny=True)
    assert took == [("float32", 1), ("float32", 2)]
    assert len(gpu.stages.kept(tmp_path)["rows"]) == 2


@pytest.mark.parametrize(
    ("other", "compiled", "expected"),
    [
        ({}, True, {"over torch.compile": 0.5}),
        ({}, False, {"over torch eager": 0.5}),
        ({"machine": {"chips": ["B"]}}, True, {"over torch.compile": "not run: speedrun was on ['B']"}),
        ({"facts": {}}, True, {"over torch.compile": "not run: speedrun left no runs"}),
    ],
)
def test_the_speedruns_ratio_is_of_one_chip_and_the_faster_mode(tmp_path, other, compiled, expected):
    def told(name: str, **facts) -> None:
        (tmp_path / name).mkdir()
        common = {"machine": {"chips": ["A"]}, "tiny": False, "rows": []}
        (tmp_path / name / gpu.stages.TOLD).write_text(json.dumps(common | facts))

    told("speedrun", **({"facts": {"runs": [{"train_s": 1.0, "eval_s": 1.0}]}} | other))
    told("speedrun_torch", facts={})
    runs = {"default": 3.0, "max-autotune": 2.0}
    found = {
        mode: {"compiled": compiled and mode, "runs": [{"train_s": seconds, "eval_s": seconds}]}
        for mode, seconds in runs.items()
    }
    rows = gpu.stages.beside(tmp_path / "speedrun_torch", found)
    assert {row.what.partition(": ours ")[2]: row.value for row in rows} == expected
    assert len(rows) == 2


def test_the_bandwidth_roof_counts_what_resnet50_computes():
    from jaxcompute.models import resnet

    model, image = resnet.ImageNetResNet50(classes=1000), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def seen(variables, image):
        return model.apply(variables, image, capture_intermediates=True)[1]["intermediates"]

    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(seen, variables, image))
    sizes = {tuple(key.key for key in path[:-2]): leaf.size for path, leaf in leaves}  # of modules, by path
    convolved = sum(size for path, size in sizes.items() if path and "Conv" in path[-1])
    joined = sum(size for path, size in sizes.items() if path and "Bottleneck" in path[-1])
    assert (convolved, joined) == (gpu.stages.CONVOLVED, gpu.stages.JOINED)
    assert 9300 < gpu.stages.bandwidth_roof(3.35e12) < 9500

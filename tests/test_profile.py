"""What a trace says: on made-up events, on what a GPU's trace looks like, and on a real one of two devices."""

import json
from types import SimpleNamespace

import jax
import pytest
import tiny

from jaxcompute.compute import hlo, profile, roofline
from jaxcompute.compute.profile import DISPATCH, FEED, Event
from jaxcompute.models import conv
from jaxcompute.models.cnn import CNN

CONV = hlo.Instruction("conv.1", hlo.CONVOLUTION, "Conv_0", True, 4e6, 1e4)
ADD = hlo.Instruction("loop_add_fusion.3", hlo.ELEMENTWISE, "optimizer", False, 10.0, 2e4)
FACTS = {"experiment": "made up", "device": "a chip", "precision": "float32", "trace": "plugins/profile/now"}
FACTS |= {"ms": 1.0, "traced_ms": 1.1, "flops": 4e6}


def summary(devices, host=(), steps=1) -> profile.Profile:
    return profile.summary(devices, host, {i.name: i for i in (CONV, ADD)}, steps, **FACTS)


def test_what_runs_inside_another_is_taken_off_its_time():
    loop, body, other = Event("while", 0, 100, "a"), Event("body", 10, 40, "a"), Event("body", 10, 60, "b")
    inner = Event("deep", 15, 20, "a")
    assert dict(profile.alone([loop, body, other, inner])) == {loop: 70, body: 25, inner: 5, other: 50}


def test_a_device_is_idle_where_nothing_of_it_runs():
    events = [Event("a", 0, 10), Event("b", 5, 20, "other"), Event("c", 30, 40), Event("d", 32, 35), Event("e", 41, 50)]
    assert list(profile.between(events)) == [(20, 30), (40, 41)]


def test_idleness_is_told_by_what_the_host_does_meanwhile():
    host = [Event(FEED, 0, 25), Event(DISPATCH, 25, 28), Event(FEED, 39, 100)]
    assert profile.blamed([(20, 30), (40, 41)], host) == {FEED: 6, DISPATCH: 3, "": 2}


def test_times_are_a_step_of_one_device():
    events = [
        Event("conv.1", 0, 2e6),
        Event("loop_add_fusion_3", 3e6, 4e6, instruction=False),
        Event("conv.1", 4e6, 6e6),
    ]
    found = summary({"0": events, "1": events}, steps=2)
    conv, add = found.ops
    assert (conv.kind, conv.place, conv.runs, conv.ms, conv.flops) == (hlo.CONVOLUTION, "Conv_0, backward", 1, 2, 4e6)
    assert (add.kind, add.place, add.ms, add.bytes) == (hlo.ELEMENTWISE, "optimizer", 0.5, 1e4)  # by its kernel's name
    assert found.idle == pytest.approx(1 / 6) and found.longest_gap_ms == 1 and found.gaps == {"": 0.5}
    text = profile.text(found)
    for words in (
        "1 ms a step; 2 steps traced, each 10% slower",
        "Conv_0, backward",
        "80.0%",
        "idle 16.7% of the time",
    ):
        assert words in text


def test_the_trace_of_a_gpu(monkeypatch, tmp_path):
    """Streams are lines of the plane; what was derived from them is left out, and a graph gives its kernels' names."""

    def event(name, start, end, **stats):
        return SimpleNamespace(name=name, start_ns=start, end_ns=end, stats=list(stats.items()))

    def line(name, *events):
        return SimpleNamespace(name=name, events=events)

    stream = line(
        "Stream #7(Compute)",
        event("sm90_xmma_fprop", 0, 5, hlo_op="conv.1", hlo_module="jit_call"),
        event("loop_add_fusion_3", 6, 8, hlo_op="command_buffer", hlo_module="jit_call"),
        event("MemcpyH2D", 9, 10, memcpy_details="..."),
    )
    derived = line("XLA Ops", event("conv.1", 0, 5, hlo_op="conv.1"))
    host = line("python", event(FEED, 0, 1), event("PjitFunction", 1, 2))
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[stream, derived]),
        SimpleNamespace(name="/host:CPU", lines=[host]),
    ]
    reader = SimpleNamespace(from_file=lambda file: SimpleNamespace(planes=planes))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    devices, doings = profile.read(tmp_path)
    assert [name for name, *_ in devices["/device:GPU:0"]] == ["conv.1", "loop_add_fusion_3", "MemcpyH2D"]
    assert list(devices) == ["/device:GPU:0"] and [doing.name for doing in doings] == [FEED]
    kinds = {op.name: op.kind for op in summary(devices, doings).ops}
    assert kinds == {"conv.1": hlo.CONVOLUTION, "loop_add_fusion_3": hlo.ELEMENTWISE, "MemcpyH2D": hlo.COPY}


def test_a_real_trace_of_two_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(conv, "_conv", conv._plain)  # convolutions as on a GPU
    exp = tiny.mlp(CNN((4, 6), (8,), 3), mesh_data=2, batch_size=32)
    found = profile.run(exp, tmp_path, seconds=0.05)
    assert found.devices == 2 and 4 <= found.steps <= 50
    assert 0 <= found.idle < 1 and found.gaps.keys() <= {*profile.HOST, ""}
    places = {op.place for op in found.ops}
    assert {"Conv_0", "Conv_1, backward", "Dense_0", "optimizer"} <= places
    assert {hlo.CONVOLUTION, hlo.COLLECTIVE, hlo.ELEMENTWISE} <= {kind for kind, _ in profile.by(found, "kind")}
    runs = {op.name: op.runs for op in found.ops if op.kind == hlo.CONVOLUTION}
    assert max(runs.values()) <= 1 and len(runs) >= 5  # no loop is around them
    assert sum(op.flops for op in found.ops if op.kind in (hlo.CONVOLUTION, hlo.MATMUL)) <= 1.02 * found.flops
    assert sum(op.ms for op in found.ops) < 10 * found.traced_ms
    left = {file.name.split(".", 1)[1] for file in (tmp_path / found.trace).iterdir()}
    assert left == {"xplane.pb", "trace.json.gz"}
    roof = roofline.place(found, "float32", 1e11, 1e10)
    roofline.picture(roof).savefig(tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10**4
    json.dumps(profile.to_json(found) | {"roofline": roofline.to_json(roof)})


@pytest.mark.parametrize(
    ("flops", "moved", "ms", "bound", "share"),
    [
        (8e8, 1e6, 10.0, "arithmetic", 0.8),  # 800 FLOP a byte; 8 ms at the peak
        (1e8, 5e7, 10.0, "memory", 0.5),  # 2 FLOP a byte; 5 ms at full bandwidth
        (0.0, 9e7, 10.0, "memory", 0.9),
        (1e6, 1e5, 10.0, "overhead", 0.001),
    ],
)
def test_what_bounds_a_step(flops, moved, ms, bound, share):
    spot = roofline.Spot("a", ms, flops, moved)
    roof = roofline.Roofline("made up", "a chip", "float32", 1e11, 1e10, spot, [spot])
    assert (roof.bound(spot), roof.share(spot)) == (bound, pytest.approx(share))
    line = roofline.text(roof).splitlines()[-1]
    assert bound in line and f"{share:.0%}" in line
    assert f"{share:.0%}" in roofline.sentence(roof)


def test_launch_leaves_a_trace_a_page_and_a_picture(launcher, tmp_path):
    ended = launcher("--experiment=digits_mlp", "--mode=profile", "--workdir=a run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    for words in ("kind of operation", "Dense_0", "idle", "bound by", "the step", "left in a run", "'--logdir=a run'"):
        assert words in ended.out
    report = json.loads((tmp_path / "a run" / "profile.json").read_text())
    assert report["ops"] and report["roofline"]["step"]["bound"] in ("arithmetic", "memory", "overhead")
    assert (tmp_path / "a run" / report["trace"]).is_dir() and (tmp_path / "a run" / "profile.png").is_file()

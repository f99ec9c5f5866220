"""The figures of benchmarks/scaling.py that come from a compiled program."""

import jax
import tiny

from benchmarks import scaling
from jaxcompute import sharding, train

TEXT = """
  %all-reduce.1 = (f32[10,5]{1,0}, /*index=1*/f32[]) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%c), dimensions={0}
  ROOT %all-reduce-start = pred[] all-reduce-start(%d), channel_id=2
  %all-reduce-done = pred[] all-reduce-done(%all-reduce-start)
  %fusion = f32[7]{0} fusion(%all-reduce.1), metadata={op_name="all-reduce("}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
    assert scaling.collectives(TEXT) == {
        "all-gather": {"count": 1, "bytes": 64},
        "all-reduce": {"count": 2, "bytes": 4 * 51 + 1},
    }


def test_a_step_over_devices_sends_its_gradient_once_and_one_device_nothing():
    def sent(devices: int) -> dict[str, dict[str, int]]:
        exp = tiny.mlp(mesh_data=devices)
        mesh = sharding.make_mesh(exp.config)
        program = train.compile(train.resolve(exp, mesh), mesh)
        gradient = 4 * sum(x.size for x in jax.tree.leaves(program.abstract.params))
        found = scaling.collectives(program.steps(1).as_text() or "")
        assert devices == 1 or gradient <= found["all-reduce"]["bytes"] < gradient + 100  # and a few scalars of metrics
        return found

    assert sent(1) == {}
    assert set(sent(4)) == {"all-reduce"}

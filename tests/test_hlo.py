"""A compiled program's text: kinds, layers and costs, on real programs and on what a GPU's text has besides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxcompute import sharding, train
from jaxcompute.compute import hlo
from jaxcompute.models import conv
from jaxcompute.models.cnn import CNN
from jaxcompute.models.mlp import MLP

PRODUCTS = (hlo.CONVOLUTION, hlo.MATMUL)


@pytest.fixture(autouse=True)
def convolutions_as_on_a_gpu(monkeypatch):
    # on the CPU small ones are matrix products of their own
    monkeypatch.setattr(conv, "_conv", conv._plain)


def step_of(model: nn.Module, **fields) -> tuple[train.Program, list[hlo.Instruction]]:
    exp = tiny.mlp(model, **({"mesh_data": 1, "batch_size": 32} | fields))
    mesh = sharding.make_mesh(exp.config)
    program = train.compile(train.resolve(exp, mesh), mesh)
    return program, list(hlo.read(program.compiled(1).as_text()).values())


@pytest.mark.parametrize("model", [MLP((16, 8), 3), CNN((4, 6), (8,), 3)], ids=["MLP", "CNN"])
def test_a_steps_products_are_those_that_were_traced(model):
    program, found = step_of(model)
    assert sum(x.flops for x in found if x.kind in PRODUCTS) == pytest.approx(program.flops(), rel=0.02)


def test_bytes_are_about_what_xla_counts():
    program, found = step_of(CNN((4, 6), (8,), 3))
    counted = program.compiled(1).cost_analysis()
    assert sum(x.bytes for x in found) == pytest.approx(counted["bytes accessed"], rel=0.1)


def test_layers_and_passes_are_known():
    _, found = step_of(CNN((4, 6), (8,), 3))
    products = {(x.layer, x.backward) for x in found if x.kind in PRODUCTS}
    assert {("Conv_0", False), ("Conv_1", False), ("Conv_1", True), ("Dense_0", True)} <= products
    assert {"max_pool", "loss", "optimizer", "prepare", "data"} <= {x.layer for x in found}


def test_a_collective_is_seen():
    _, found = step_of(MLP((16,), 3), mesh_data=2)
    assert any(x.kind == hlo.COLLECTIVE and x.bytes > 0 for x in found)


def test_reading_a_few_rows_of_a_large_array_is_those_rows():
    big, rows = jnp.zeros((10_000, 64)), jnp.zeros(8, jnp.int32)
    text = jax.jit(lambda big, rows: 2 * big[rows]).lower(big, rows).compile().as_text()
    assert sum(x.bytes for x in hlo.read(text).values()) < 10 * 8 * 64 * 4


# as XLA writes for a GPU: libraries' calls and a fused product
GPU = """HloModule jit_call, is_scheduled=true

%gemm_fusion_dot.3_computation (p0: bf16[128,64], p1: bf16[64,32]) -> bf16[128,32] {
  %p0 = bf16[128,64]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  ROOT %dot.9 = bf16[128,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(call)/while/body/closed_call/jit(advance)/jvp(CNN)/Dense_0/dot_general"}
}

ENTRY %main.5 (x: bf16[8,16,16,4], w: bf16[3,3,4,6], dy: bf16[8,16,16,6], a: bf16[128,64], b: bf16[64,32]) -> bf16[128,32] {
  %x = bf16[8,16,16,4]{3,2,1,0} parameter(0)
  %w = bf16[3,3,4,6]{3,2,1,0} parameter(1)
  %dy = bf16[8,16,16,6]{3,2,1,0} parameter(2)
  %x_nchw = bf16[8,4,16,16]{3,2,1,0} transpose(%x), dimensions={0,3,1,2}
  %dy_nchw = bf16[8,6,16,16]{3,2,1,0} transpose(%dy), dimensions={0,3,1,2}
  %a = bf16[128,64]{1,0} parameter(3)
  %b = bf16[64,32]{1,0} parameter(4)
  %forward = (bf16[8,16,16,6]{3,2,1,0}, u8[1024]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(call)/jit(advance)/jvp(CNN)/Conv_0/conv_general_dilated"}
  %wgrad = (bf16[6,4,3,3]{3,2,1,0}, u8[1024]{0}) custom-call(%x_nchw, %dy_nchw), window={size=3x3 pad=1_1x1_1}, dim_labels=bf01_oi01->bf01, custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="jit(call)/jit(advance)/transpose(jvp(CNN))/Conv_0/conv_general_dilated"}
  %dgrad = (bf16[8,16,16,4]{3,2,1,0}, u8[1024]{0}) custom-call(%dy, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput", metadata={op_name="jit(call)/jit(advance)/transpose(jvp(CNN))/Conv_0/conv_general_dilated"}
  %gemm = (bf16[128,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %gemm_fusion = bf16[128,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm_fusion_dot.3_computation
}
"""  # noqa: E501


def test_the_calls_of_a_gpus_libraries():
    found = hlo.read(GPU)
    conv, gemm = 2 * 8 * 16 * 16 * 6 * 9 * 4, 2 * 128 * 64 * 32
    for name in ("forward", "wgrad", "dgrad"):
        assert (found[name].kind, found[name].flops, found[name].layer) == (hlo.CONVOLUTION, conv, "Conv_0"), name
    assert [found[name].backward for name in ("forward", "wgrad", "dgrad")] == [False, True, True]
    assert (found["gemm"].kind, found["gemm"].flops) == (hlo.MATMUL, gemm)
    fused = found["gemm_fusion"]
    assert (fused.kind, fused.flops, fused.layer) == (hlo.MATMUL, gemm, "Dense_0")
    assert fused.bytes == 2 * (128 * 64 + 64 * 32 + 128 * 32)
    assert "dot.9" not in found


@pytest.mark.parametrize(
    ("op_name", "layer", "backward"),
    [
        ("jit(call)/jit(advance)/jvp(ResNet)/Block_3/Conv_0/conv_general_dilated", "Block_3/Conv_0", False),
        ("jit(call)/jit(advance)/transpose(jvp(ResNet))/Block_3/BatchNorm_0/mul", "Block_3/BatchNorm_0", True),
        ("jit(call)/jit(advance)/jvp(CNN)/jit(relu)/max", "CNN (itself)", False),
        ("jit(call)/jit(advance)/jvp(loss)/reduce_sum", "loss", False),
        ("jit(call)/jit(advance)/optimizer/mul", "optimizer", False),
        ("jit(call)/jit(advance)/while/body/jvp(MLP)/Dense_0/dot_general", "Dense_0", False),
        ("jit(call)/jit(advance)/prepare/vmap(jit(_randint))/vmap()/add", "prepare", False),
        ("jit(f)/CNN/Conv_0/conv_general_dilated", "Conv_0", False),
        ("jit(call)/jit(advance)/jit(_threefry_fold_in)/train_step/add", "", False),
        ("jvp(MLP)/Dense_0/reduce_sum:jvp(MLP)/Dense_1/reduce_sum", "several layers", False),
        ("reduce_sum", "", False),
        ("", "", False),
    ],
)
def test_the_layer_is_what_the_scopes_say(op_name, layer, backward):
    assert hlo.layer(op_name) == (layer, backward)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", hlo.CONVOLUTION),
        ("nvjet_hsh_128x256", hlo.MATMUL),
        ("ncclDevKernel_AllReduce_Sum_bf16", hlo.COLLECTIVE),
        ("MemcpyD2D", hlo.COPY),
        ("loop_add_fusion_3", hlo.ELEMENTWISE),
        ("something", hlo.OTHER),
    ],
)
def test_a_kernel_without_an_instruction_is_told_by_its_name(kernel, kind):
    assert hlo.library_kind(kernel) == kind

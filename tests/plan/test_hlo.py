"""Figures read out of compiled programs, against programs whose figures are known."""

import jax
import jax.numpy as jnp
import pytest

from piflow_jax import errors
from piflow_jax.plan import chips
from piflow_jax.plan import hlo

# Cut down from steps compiled for v5e. A backslash at a line's end joins it with the next.
_TEXT = """
HloModule jit_step, is_scheduled=true

%region_add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
}

%fused (p: bf16[8,128]) -> bf16[16,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], \
      dimensions={0}
}

%fused_again (p: bf16[8,128]) -> bf16[16,128] {
  ROOT %all-gather.2 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], \
      dimensions={0}
}

%all-reduce-scatter.clone.1 (input: bf16[1024,6144]) -> bf16[256,6144] {
  %input = bf16[1024,6144]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.2 = bf16[1024,6144]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, \
      replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, use_global_device_ids=true, \
      to_apply=%region_add, frontend_attributes={from-cross-replica-sharding="true"}
  %constant.shard_id_table = u32[16]{0:T(128)} constant({...})
  %partition-id.2 = u32[] partition-id()
  %dynamic-slice.4 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table, %partition-id.2), dynamic_slice_sizes={1}
  %bitcast.1 = u32[]{:T(128)} bitcast(%dynamic-slice.4)
  %constant.19 = u32[] constant(256)
  %multiply.5 = u32[]{:T(128)} multiply(%bitcast.1, %constant.19)
  %constant.20 = u32[] constant(0)
  ROOT %dynamic-slice.5 = bf16[256,6144]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.2, %multiply.5, \
      %constant.20), dynamic_slice_sizes={256,6144}
}

%cond (s: (s32[], f32[512,16,2,4])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(28)
  ROOT %compare = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%body (s: (s32[], f32[512,16,2,4])) -> (s32[], f32[512,16,2,4]) {
  %fusion.1 = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, \
      backend_config={"estimated_cycles":"100"}
  %fusion.2 = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused_again, \
      backend_config={"estimated_cycles":"10"}
  %wide = f32[512,16,2,4]{3,2,1,0:T(8,128)} copy(%y), backend_config={"estimated_cycles":"1"}
  %near = f32[512,16,2,4]{3,2,1,0:T(8,128)S(1)} copy(%y)
  %splash.1 = bf16[16,128]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", \
      backend_config={"custom_call_config":{"body":""}}
  %good = f32[512,16,2,4]{0,1,2,3:T(8,128)} copy(%y)
}

ENTRY %main (p: f32[]) -> f32[] {
  %fusion.9 = bf16[256,6144]{1,0:T(8,128)(2,1)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.clone.1, \
      backend_config={"collective_algorithm_config":{"strategy":"StrategyRing"}}
  %while.1 = (s32[]{:T(128)}, f32[512,16,2,4]{3,2,1,0:T(8,128)}) while(%t), condition=%cond, body=%body
  %all-reduce.1 = (f32[100]{0:T(128)}, f32[28]{0:T(128)}) all-reduce(%a, %b), channel_id=8, \
      replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%region_add
  %all-reduce.2 = f32[128]{0:T(128)} all-reduce(%a), channel_id=18, \
      replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=64], device_ids=([64,8]T(1,0)) {'axis_1'}, to_apply=%region_add
  %all-reduce.3 = f32[128]{0:T(128)} all-reduce(%a), channel_id=19, replica_groups={{0,1,2,3},{4,5,6,7}}, \
      to_apply=%region_add
  %collective-permute-start.1 = (f32[64]{0:T(128)}, f32[64]{0:T(128)}, u32[]{:T(128)}) collective-permute-start(%a), \
      channel_id=9
  %unknown = f32[]{:T(128)} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %r = f32[]{:T(128)} fusion(%x), kind=kLoop, calls=%region_add, backend_config={"estimated_cycles":"5"}
}
"""


def test_loops_count_by_their_length_and_collectives_once_a_channel():
  runs = hlo.runs(_TEXT)
  assert hlo.cycles(runs) == 28 * 111 + 5 and hlo.kernels(runs) == 28
  assert hlo.collectives(runs) == {
      "reduce-scatter": (1, 1024 * 6144 * 2 * 3 / 4),  # in the text it is an all-reduce, of which a part is kept
      "all-gather": (28, 28 * 16 * 128 * 2 / 2), "all-reduce": (3, 2 * 128 * 4 * (3 / 4 + 7 / 8 + 3 / 4)),
      "collective-permute": (1, 256.0)}


def test_a_group_that_cannot_be_read_is_no_group_of_one():
  with pytest.raises(ValueError, match="without a group"):
    hlo.collectives(hlo.runs(_TEXT.replace("replica_groups=[1,2]<=[2]", "replica_groups=odd")))


def test_what_tiling_adds():
  wasted = hlo.padded(hlo.runs(_TEXT))
  # The last two axes of %wide, 2 x 4, lie in tiles of 8 x 128. %good lies the other way round, and %near on the chip.
  want = "f32[512,16,2,4]", 512 * 16 * 8 * 4, 512 * 16 * 8 * 128 * 4
  assert {(b.text, b.bytes, b.padded) for b in wasted} == {want}


def test_a_compiled_loop_is_read_as_often_as_it_runs():
  def f(x):
    return jax.lax.fori_loop(0, 13, lambda _, x: jnp.sin(x @ x), x)

  runs = hlo.runs(jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text())
  assert 13 in {times for i, times, _ in runs if i.op == "dot" or "dot" in i.name}


@pytest.mark.parametrize("name, found", [
    ("v5e:4x4", ("v5e", "4x4")), ("v5e-16", ("v5e", "4x4")), ("v5litepod-16", ("v5e", "4x4")),
    ("v6e-256", ("v6e", "16x16")), ("v5p:8x8x8", ("v5p", "8x8x8")), ("v5p-128", ("v5p", "4x4x4"))])
def test_slices_by_shape_or_size(name, found):
  assert chips.slice_name(name) == found


@pytest.mark.parametrize("name", [
    "v5e", "v5e-17", "b200-8", "v7:2x2", "", "v5e:4x4x4", "v5e:3x3", "v5e:abc", "v5p:4x4", "v5p:0x2x2", "v5p-9",
    "v4-8"])
def test_slices_that_there_are_not(name):
  with pytest.raises(errors.UserError, match="--topology: .* is no slice known here"):
    chips.slice_name(name)


def test_cards_are_counted():
  assert chips.slice_name("h100-8") == ("h100", "8") and chips.slice_name("a100-1") == ("a100", "1")
  for name in ("h100", "h100-3", "h100-16", "h100:8", "h200:2x4", "a100-"):
    with pytest.raises(errors.UserError, match="--topology: .* 1, 2, 4 or 8 cards of one host"):
      chips.slice_name(name)

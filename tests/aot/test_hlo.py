# SPDX-License-Identifier: Apache-2.0
"""Traffic read from compiled programs: hand-written text, and a really compiled sharded program counted by hand."""

import json

import pytest
from eight_devices import on_eight_devices

from rlp_jax.aot import hlo
from rlp_jax.aot.hlo_cost import replica_groups, sent_bytes, traffic
from rlp_jax.aot.jaxpr_cost import Turns, UnknownTurns

TEXT = """HloModule jit_f, is_scheduled=true

%take (p.0: f32[8,4], p.1: s32[]) -> f32[1,4] {
  %p.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = f32[1,4]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,4}
}

%fused (a.0: f32[8,4], a.1: s32[], a.2: f32[1,4]) -> f32[8,4] {
  %a.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %a.2 = f32[1,4]{1,0:T(8,128)} parameter(2)
  %a.1 = s32[]{:T(128)} parameter(1)
  %inner = f32[1,4]{1,0:T(8,128)} fusion(%a.0, %a.1), kind=kLoop, calls=%take
  %sum = f32[1,4]{1,0:T(8,128)} add(%inner, %a.2)
  %nil = s32[]{:T(128)} constant(0)
  ROOT %put = f32[8,4]{1,0:T(8,128)} dynamic-update-slice(%a.0, %sum, %a.1, %nil)
}

%all-reduce-scatter.1 (r.0: f32[8,4]) -> f32[2,4] {
  %r.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %whole = f32[8,4]{1,0:T(8,128)} all-reduce(%r.0), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %own = s32[]{:T(128)} constant(0)
  ROOT %share = f32[2,4]{1,0:T(8,128)} dynamic-slice(%whole, %own, %own), dynamic_slice_sizes={2,4}
}

%body (b: (s32[], f32[8,4], f32[1,4])) -> (s32[], f32[8,4], f32[1,4]) {
  %b = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %y = f32[1,4]{1,0:T(8,128)S(1)} get-tuple-element(%b), index=2
  %z = f32[8,4]{1,0:T(8,128)} fusion(%x, %i, %y), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/go/while/body/add"}
  %scattered = f32[2,4]{1,0:T(8,128)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) tuple(%i, %z, /*index=2*/%y)
}

%counted (c: (s32[], f32[8,4], f32[1,4])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) parameter(0)
  %end = s32[]{:T(128)} constant(12)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

%found (d: (s32[], f32[8,4], f32[1,4])) -> pred[] {
  %d = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%d), index=0
  ROOT %eq = pred[]{:T(512)} compare(%k, %k), direction=EQ
}

ENTRY %main (m.0: f32[8,4], m.1: f32[1,4]) -> f32[8,4] {
  %m.0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %m.1 = f32[1,4]{1,0:T(8,128)} parameter(1)
  %two = s32[]{:T(128)} constant(2)
  %near = (f32[1,4]{1,0:T(8,128)S(1)}, f32[1,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%m.1)
  %y0 = f32[1,4]{1,0:T(8,128)S(1)} copy-done(%near)
  %t0 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) tuple(%two, %m.0, %y0)
  %w0 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}, f32[1,4]{1,0:T(8,128)S(1)}) while(%t0), condition=%COND, body=%body, metadata={op_name="jit(f)/go/while"}
  ROOT %out = f32[8,4]{1,0:T(8,128)} get-tuple-element(%w0), index=1
}
"""  # noqa: E501


def test_traffic_of_a_loop_by_hand():
    module = hlo.parse(TEXT.replace("%COND", "%counted"))
    moved = traffic(module, Turns(), ("go",), chips_per_slice=8)
    # A turn reads a row of x through the nested fusion, the number twice 4 bytes; y lies near the core; the row is put
    # back in place. Then the fusion around the all-reduce reads 8 rows and writes 2.
    assert moved["go"].hbm_bytes == 10 * ((16 + 4 + 16) + (128 + 32))
    assert moved["go"].moved["jit(f)/go/while/body/add", "f32[8,4]"] == 10 * (16 + 4 + 16)
    assert moved[""].hbm_bytes == 16  # copied near the core
    (scatter,) = moved["go"].collectives
    assert (scatter.kind, scatter.group, scatter.times) == ("reduce-scatter", 4, 10)
    assert moved["go"].ici_bytes == 10 * 128 * 3 / 4
    assert moved["go"].by_kind() == {"reduce-scatter": 960.0}


def test_loops_without_a_known_end_take_the_turns_of_their_scope():
    module = hlo.parse(TEXT.replace("%COND", "%found"))
    assert traffic(module, Turns({"go": 3}), ("go",), 8)["go"].collectives[0].times == 3
    with pytest.raises(UnknownTurns, match="go/while"):
        traffic(module, Turns(), ("go",), 8)


def test_groups_across_slices_use_the_hosts_network():
    module = hlo.parse(TEXT.replace("%COND", "%counted"))
    moved = traffic(module, Turns(), ("go",), chips_per_slice=2)["go"]
    assert (moved.ici_bytes, moved.dcn_bytes) == (0, 960)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x=1", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x=1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}, x=1", [[3, 2], [1, 0]]),
        ("source_target_pairs={{0,1},{1,0}}, x=1", [[0, 1], [1, 0]]),
        ("x=1", []),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(text) == groups


def test_bytes_that_a_chip_sends():
    assert sent_bytes("all-gather", 10, 40, 4) == 30
    assert sent_bytes("reduce-scatter", 40, 10, 4) == 30
    assert sent_bytes("all-reduce", 40, 40, 4) == 60
    assert sent_bytes("all-to-all", 40, 40, 4) == 30
    assert sent_bytes("collective-permute", 40, 40, 2) == 40
    assert sent_bytes("all-reduce", 40, 40, 1) == 0


def test_sizes():
    small, near, counts = hlo.shapes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3]{0:S(1)}, /*index=2*/pred[])")
    assert (small.bytes, small.hbm, near.bytes, near.hbm, counts.bytes) == (2048, 2048, 1.5, 0, 1)


COMPILED = """
    import json

    import jax, jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    from rlp_jax.aot import hlo
    from rlp_jax.aot.hlo_cost import traffic
    from rlp_jax.aot.jaxpr_cost import Turns

    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "tensor")))

    @jax.jit
    def program(x, w, n):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(jnp.sin(x @ w), NamedSharding(mesh, P("fsdp")))
            return x, None

        with jax.named_scope("steps"):
            x = jax.lax.fori_loop(0, n, lambda _, x: jax.lax.scan(layer, x, w)[0], x)
        with jax.named_scope("total"):
            return x.sum()

    text = program.trace(x, w, jnp.int32(0)).lower().compile().as_text()
    moved = traffic(hlo.parse(text), Turns({"steps": 7}), ("steps", "total"), 8)
    print(json.dumps({name: one.by_kind() for name, one in moved.items()}))
"""


def test_a_compiled_program():
    """Each of 7 x 5 turns gathers [4, 64] of float32 over two devices; the sum is reduced over four."""
    moved = json.loads(on_eight_devices(COMPILED))
    assert moved["steps"] == {"all-gather": 7 * 5 * 4 * 64 * 4 / 2}
    assert moved["total"] == {"all-reduce": 2 * 4 * 3 / 4}

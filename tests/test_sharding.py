# SPDX-License-Identifier: Apache-2.0
"""Rules, meshes, and a sharded run of the real parameter tree on eight simulated devices."""

import dataclasses

import jax
import numpy as np
import pytest
from eight_devices import on_eight_devices
from hybrids import hybrid
from reference import FAMILIES, MORE_FAMILIES, tiny

from rlp_jax.config import ConfigError, MeshConfig
from rlp_jax.sharding import make_mesh, mesh_shape, place_batch, place_state, rule_for


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (1, 2, 2, 2)),
        (MeshConfig(data=1, fsdp=4, tensor=2), 8, (1, 1, 4, 2)),
        (MeshConfig(slices=2, data=-1, fsdp=2), 8, (2, 2, 2, 1)),
    ],
)
def test_mesh_shape(config, devices, shape):
    assert mesh_shape(config, devices) == shape


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=2), 1, "data=2 fsdp=1 tensor=1 needs 2 devices, there are 1"),
        (MeshConfig(fsdp=3), 8, "needs a multiple of 3 devices, there are 8"),
        (MeshConfig(data=-1, fsdp=-1), 8, "at most one but slices is -1"),
        (MeshConfig(slices=-1), 8, "at most one but slices is -1"),
        (MeshConfig(slices=3), 8, "slices=3 needs a multiple of 3 devices, there are 8"),
        (MeshConfig(data=0), 8, "axes are 1 or more"),
    ],
)
def test_impossible_meshes(config, devices, message):
    with pytest.raises(ConfigError, match=message):
        mesh_shape(config, devices)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "made up"
    process_index: int = 0


def test_slices_come_first_whatever_the_order_of_devices():
    devices = [Device(number, number % 2) for number in range(8)]
    mesh = make_mesh(MeshConfig(slices=2, fsdp=2, tensor=2, data=1), devices)
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor") and mesh.devices.shape == (2, 1, 2, 2)
    assert [[d.slice_index for d in part.flat] for part in mesh.devices] == [[0] * 4, [1] * 4]
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_slices_that_were_not_said():
    devices = [Device(number, number // 4, "tpu") for number in range(8)]
    with pytest.raises(ConfigError, match=r"mesh\.slices is 1, the devices belong to 2 slices: set mesh\.slices=2"):
        make_mesh(MeshConfig(), devices)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "nemotron_h"])
def test_every_leaf_of_every_family_has_a_rule(family):
    model = hybrid() if family == "nemotron_h" else tiny(family)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = rule_for(name)
        assert rule is not None and len(rule) <= leaf.ndim, name
        assert len(rule) or leaf.size < 500, name  # what is replicated is small


def test_one_device_has_no_mesh_and_moves_nothing():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = {"tokens_BT": np.zeros((2, 3))}
    assert mesh is None
    assert place_batch(batch, mesh) is batch
    assert place_state(batch, mesh) is batch


EIGHT_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import PartitionSpec as P
    from rlp_jax.config import MeshConfig, OptimizerConfig
    from rlp_jax.models.transformer import LanguageModel, ModelConfig
    from rlp_jax.optimizer import make_optimizer
    from rlp_jax.sharding import make_mesh, place_batch, place_state, state_shardings
    from rlp_jax.state import init_state

    assert jax.device_count() == 8
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = LanguageModel({config})
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 10)
    state = init_state(model.init(jax.random.key(0)), optimizer)
    shardings = state_shardings(jax.eval_shape(lambda: state), mesh)
    params = shardings.params
    assert params["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert params["layers"]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert params["layers"]["attention"]["k"]["kernel"].spec == P(None, "fsdp", None, None)  # 1 head, 2 ways
    assert params["layers"]["attention"]["o"]["kernel"].spec == P(None, "tensor", None, "fsdp")
    assert params["layers"]["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert params["final_norm"]["scale"].spec == P()
    adam = shardings.opt_state[1][0]
    assert adam.mu["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor") and adam.count.spec == P()
    assert shardings.ema_params == shardings.params

    def update(state, batch):
        def loss(params):
            logits_BTV, _ = model.apply(params, batch["tokens_BT"])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits_BTV[:, :-1], batch["tokens_BT"][:, 1:]).mean()
        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), value

    batch = {{"tokens_BT": np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)}}
    plain, plain_loss = jax.jit(update)(state, batch)
    sharded = jax.jit(update, out_shardings=(shardings, None), donate_argnums=0)
    placed = place_batch(batch, mesh)
    assert placed["tokens_BT"].sharding.spec == P(("slice", "data", "fsdp"))
    assert place_batch({{"tokens_BT": batch["tokens_BT"][:6]}}, mesh)["tokens_BT"].sharding.is_fully_replicated
    moved, loss = sharded(place_state(state, mesh), placed)
    up = moved.params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * 4 == up.size
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    # The first AdamW update has the size of the learning rate whatever the gradient's: compare the moments.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
                 moved.opt_state[1][0].mu, plain.opt_state[1][0].mu)
    print("eight devices agree with one")
"""


def test_eight_devices_compute_what_one_does():
    config = "ModelConfig('llama', vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=1, head_dim=8, d_ff=64)"
    assert "agree" in on_eight_devices(EIGHT_DEVICES.format(config=config))

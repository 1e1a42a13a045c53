# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 mixer against a sequential recurrence in float64, and its gradients against that recurrence's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from rlp_jax.models.mamba2 import GatedGroupNorm, HybridConfig, Mamba2, MambaState, ssd, ssd_step, states_at

pytestmark = pytest.mark.usefixtures("quick_compiles")
n, J, P, U, Z = 2, 6, 3, 2, 5  # sequences, heads, their width, groups, state size
D, EPS = 8, 1e-3


def inputs(S, seed=0):
    """x, dt, A, B, C, and a state to start from; decays from almost none to almost all in one token."""
    rng = np.random.default_rng(seed)
    x, b, c = rng.normal(size=(n, S, J, P)), rng.normal(size=(n, S, U, Z)), rng.normal(size=(n, S, U, Z))
    dt, a = np.exp(rng.uniform(-5, 1, (n, S, J))), -np.exp(rng.uniform(-2, 2, J))
    return [array.astype(np.float32) for array in (x, dt, a, b, c, rng.normal(size=(n, J, P, Z)))]


def recurrence(x, dt, a, b, c, start, xp=np):
    """y [n, S, J, P] and the states before every token and after the last [n, S + 1, J, P, Z], one token at a time."""
    b, c = (xp.repeat(array, x.shape[2] // array.shape[2], 2) for array in (b, c))
    states, out = [start], []
    for s in range(x.shape[1]):
        decay = xp.exp(dt[:, s] * a)[..., None, None]
        new = (dt[:, s, :, None] * x[:, s])[..., None] * b[:, s, :, None]
        states.append(states[-1] * decay + new)
        out.append(xp.einsum("njpz,njz->njp", states[-1], c[:, s]))
    return xp.stack(out, 1), xp.stack(states, 1)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # on CPU chunks are smaller, and each is taken in a branch
@pytest.mark.parametrize(("S", "chunk"), [(12, 4), (13, 4), (3, 4), (4, 4), (7, 1), (1, 4), (9, 128), (150, 128)])
def test_chunks_against_the_recurrence(S, chunk, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    arrays = inputs(S)
    y, states = recurrence(*(array.astype(np.float64) for array in arrays))
    stop_nK = np.tile(np.arange(S + 1), (n, 1))

    @jax.jit
    def scanned(*arrays):
        y, end, chunks = ssd(*arrays, chunk)
        return y, end, states_at(chunks, stop_nK)

    got_y, got_end, got_states = scanned(*map(jnp.asarray, arrays))
    assert {x.dtype for x in (got_y, got_end, got_states)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(got_y, y, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got_end, states[:, -1], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(got_states, states, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_gradients_against_those_of_the_recurrence(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    S, rng = 11, np.random.default_rng(1)
    arrays = [jnp.asarray(array) for array in inputs(S)]
    stop_nK = jnp.array([[0, 4, 11], [3, 8, 9]])
    weights = [rng.normal(size=shape) for shape in ((n, S, J, P), (n, J, P, Z), (n, 3, J, P, Z))]

    def loss(scan, arrays):
        return sum(jnp.sum(weight * part) for weight, part in zip(weights, scan(*arrays), strict=True))

    def chunked(*arrays):
        y, end, chunks = ssd(*arrays, 4)
        return y, end, states_at(chunks, stop_nK)

    def naive(*arrays):
        y, states = recurrence(*arrays, jnp)
        return y, states[:, -1], jnp.take_along_axis(states, stop_nK[..., None, None, None], 1)

    got, wanted = (jax.jit(jax.grad(lambda arrays, f=f: loss(f, arrays)))(arrays) for f in (chunked, naive))
    assert min(float(jnp.linalg.norm(gradient)) for gradient in wanted) > 0.1
    assert relative_error(got, wanted) < 1e-5


def test_steps_are_the_recurrence():
    x, dt, a, b, c, state = inputs(6)
    y, states = recurrence(*(array.astype(np.float64) for array in (x, dt, a, b, c, state)))
    for s in range(6):
        out, state = jax.jit(ssd_step)(x[:, s], dt[:, s], a, b[:, s], c[:, s], state)
        np.testing.assert_allclose(out, y[:, s], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state, states[:, s + 1], rtol=1e-4, atol=1e-5)


def test_extreme_decays_stay_finite():
    x, dt, a, b, c, start = inputs(12)
    dt[:, ::2], a[:3] = 1e3, -1e3  # exp(-10^6) within a chunk, beside steps that forget nothing

    def out(arrays):
        y, end, chunks = ssd(*arrays, 4)
        return y, end, states_at(chunks, jnp.array([[1, 5], [0, 12]]))

    arrays = [jnp.asarray(array) for array in (x, dt, a, b, c, start)]
    values = jax.jit(out)(arrays)
    grads = jax.jit(jax.grad(lambda arrays: sum(part.sum() for part in out(arrays))))(arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, grads)))
    exact, _ = recurrence(*(array.astype(np.float64) for array in (x, dt, a, b, c, start)))
    np.testing.assert_allclose(values[0], exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


def test_gated_norm_by_hand():
    # silu(1.2784645) = 1, so the groups are (3, 4) and (0, 2), with root mean squares 3.535534 and 1.414214.
    z = np.full(4, 1.2784645, np.float32)
    out = GatedGroupNorm(2, 0.0).apply({"params": {"scale": jnp.array([1.0, 10.0, 1.0, 1.0])}}, np.r_[3.0, 4, 0, 2], z)
    np.testing.assert_allclose(out, [0.848528, 11.313708, 0.0, 1.414214], rtol=1e-5)


def numpy_mixer(cfg, params, x_SD):
    """The mixer for one sequence in float64, token by token."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inner, width, S = cfg.heads * cfg.head_dim, cfg.conv_kernel, len(x_SD)
    projected = x_SD @ params["in_proj"]["kernel"]
    z, raw, dt = np.split(projected, [inner, inner + cfg.channels], -1)
    padded = np.concatenate([np.zeros((width - 1, cfg.channels)), raw])
    mixed = np.stack([(padded[s : s + width] * params["conv"]["kernel"]).sum(0) for s in range(S)])
    mixed = mixed + params["conv"].get("bias", 0.0)
    mixed = mixed / (1 + np.exp(-mixed))
    x, b, c = np.split(mixed, [inner, inner + cfg.groups * cfg.state_size], -1)
    x = x.reshape(S, cfg.heads, cfg.head_dim)
    b, c = (array.reshape(S, cfg.groups, cfg.state_size) for array in (b, c))
    dt = np.clip(np.log1p(np.exp(dt + params["dt_bias"])), *cfg.time_step_limit)
    start = np.zeros((1, cfg.heads, cfg.head_dim, cfg.state_size))
    y, _ = recurrence(*(array[None] for array in (x, dt)), -np.exp(params["A_log"]), b[None], c[None], start)
    y = (y[0] + params["D"][:, None] * x).reshape(S, inner) * z / (1 + np.exp(-z))
    y = y.reshape(S, cfg.groups, -1)
    y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS)).reshape(S, inner) * params["gate_norm"]["scale"]
    return y @ params["out_proj"]["kernel"]


def mixer(**changes):
    cfg = HybridConfig(
        **{"pattern": "M", "heads": J, "head_dim": P, "state_size": Z, "groups": U, "chunk_size": 4, **changes}
    )
    module = Mamba2(cfg, EPS)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    return module, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_bias": False, "conv_kernel": 2}, {"time_step_limit": (0.5, 0.9)}, {"groups": 1}, {"groups": 6}],
)
def test_mixer_against_float64(changes):
    module, params = mixer(**changes)
    x = np.random.default_rng(3).normal(size=(n, 11, D)).astype(np.float32)
    out, state = jax.jit(module.apply)({"params": params}, x)
    exact = np.stack([numpy_mixer(module.config, params, row.astype(np.float64)) for row in x])
    assert np.std(exact) > 0.1
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)
    assert state.ssm.shape == (n, J, P, Z) and state.conv.shape == (
        n,
        module.config.conv_kernel - 1,
        module.config.channels,
    )


@pytest.mark.parametrize("pieces", [(1, 2, 3, 5), (5, 1, 1, 4), (2, 9)])
def test_pieces_are_the_whole(pieces):
    module, params = mixer()
    x = np.random.default_rng(3).normal(size=(n, 11, D)).astype(np.float32)
    run = jax.jit(module.apply)
    whole, end = run({"params": params}, x)
    stops = np.cumsum(pieces)[:-1]
    _, at_stops = run({"params": params}, x, None, jnp.tile(stops, (n, 1)))
    state = None
    for k, size in enumerate(pieces):
        first = sum(pieces[:k])
        out, state = run({"params": params}, x[:, first : first + size], state)
        np.testing.assert_allclose(out, whole[:, first : first + size], rtol=1e-4, atol=1e-6)
        expected = MambaState(*(part[:, k] for part in at_stops)) if k < len(stops) else end
        for got, wanted in zip(state, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_initial_values_are_those_of_mamba_2():
    cfg = HybridConfig(pattern="M", heads=512, head_dim=2, state_size=2, groups=2)
    params = jax.jit(Mamba2(cfg, EPS).init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    a, step = np.exp(params["A_log"]), np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 1 <= a.min() < 1.5 and 15.5 < a.max() <= 16
    assert 0.00099 < step.min() < 0.0012 and 0.085 < step.max() < 0.101
    assert np.all(params["D"] == 1) and np.abs(params["conv"]["kernel"]).max() <= 0.5


def test_bfloat16_keeps_its_state_in_float32():
    module, params = mixer()
    x = np.random.default_rng(3).normal(size=(n, 11, D)).astype(np.float32)
    exact, _ = jax.jit(module.apply)({"params": params}, x)
    out, state = jax.jit(module.apply)({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == state.conv.dtype == jnp.bfloat16 and state.ssm.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03  # some ten roundings to 8 bits

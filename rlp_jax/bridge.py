# SPDX-License-Identifier: Apache-2.0
"""flax.nnx on either side: a module of the user's as (params, function), and our model as a module.

Everything here is functions of (params, ...), nnx keeps parameters inside modules. `functional` takes a module apart
for our functions, `write_back` puts parameters back, `as_module` makes a module of a `LanguageModel`. Arrays are never
copied.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from rlp_jax.models.cache import Cache
from rlp_jax.models.transformer import LanguageModel, Params


class Functional(NamedTuple):
    """params: nested dicts of arrays, named as the module's attributes. apply_fn: see `functional`."""

    params: Params
    apply_fn: Callable[..., Any]


def functional(module: nnx.Module, wrt: Any = nnx.Param) -> Functional:
    """A module as parameters and a pure function of them, for `objective.py`, optax, `jax.grad` and `jax.jit`.

    `apply_fn(params, *args, method="__call__", **kwargs)` is the module's method with these parameters. Everything else
    in the module (running statistics, random streams, parameters outside `wrt`) is as it was when it was taken apart:
    what a call changes of it is lost, and a second call repeats the first, dropout included. So call `module.eval()`
    first where the module has a training mode: dropout would make the importance ratio differ from 1 for no reason.

    Args:
      module: any nnx module; it is left as it is.
      wrt: an nnx filter, the variables that count as parameters (nnx.LoRAParam: an adapter's alone).

    Returns:
      (params, apply_fn). A parameter that stands in two places is in `params` once.

    Raises:
      ValueError: nothing in the module is in `wrt`.
    """
    graph, *states = nnx.split(module, wrt, ...)
    state, rest = states
    variables = dict(nnx.to_flat_state(state))
    if not variables:
        raise ValueError(f"{type(module).__name__} has no variables of {wrt}: nothing to train")
    rest = jax.tree.map(lambda value: value, rest)  # variables of our own, which the module's later calls do not change

    def apply_fn(params: Params, *args, method: str = "__call__", **kwargs):
        state = _state(variables, params)
        # A copy for each call, whose variables may be changed while it is traced.
        called = nnx.merge(graph, state, jax.tree.map(lambda value: value, rest))
        return getattr(called, method)(*args, **kwargs)

    return Functional(nnx.to_pure_dict(state), apply_fn)


def write_back(module: nnx.Module, params: Params, wrt: Any = nnx.Param) -> None:
    """Gives a module the parameters that `functional` took out of it, trained since.

    Args:
      module: changed in place.
      params: of the structure that `functional` gave.
      wrt: as given to `functional`.

    Raises:
      ValueError: other names or shapes than the module's; it is left as it is.
    """
    variables = dict(nnx.to_flat_state(nnx.state(module, wrt)))
    state = _state(variables, params)
    for path, variable in nnx.to_flat_state(state):
        expected, given = variables[path].get_value().shape, variable.get_value().shape
        if expected != given:
            raise ValueError(f"parameter {_name(path)} has shape {given}, the module's has {expected}")
    nnx.update(module, state)


class LanguageModule(nnx.Module):
    """A `LanguageModel` and its parameters as one module: `as_module` makes it.

    Attributes:
      model: the handle on pure functions.
      params: the tree of ARCHITECTURE.md, each leaf an nnx.Param: `module.params["final_norm"]["scale"]`.
    """

    def __init__(self, model: LanguageModel, params: Params):
        self.model = model
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(
        self, tokens: jax.Array, cache: Cache | None = None, stops_BK: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """`LanguageModel.apply`: logits and the cache, which `rlp_jax.fork` takes."""
        return self.model.apply(self.tree(), tokens, cache, stops_BK)

    def tree(self) -> Params:
        """The parameters as plain arrays, what every other function here takes."""
        return jax.tree.map(lambda param: param[...], self.params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def as_module(model: LanguageModel, params: Params) -> LanguageModule:
    """Our model as an nnx.Module, for `nnx.grad`, `nnx.jit` and `nnx.Optimizer`.

    Args:
      model, params: as `rlp_jax.load` gives them. The module holds these very arrays until it is trained.

    Returns:
      The module. `module.tree()` is `params` again, bit for bit.
    """
    return LanguageModule(model, params)


def _state(variables: dict[tuple, nnx.Variable], params: Params) -> nnx.State:
    """The variables with these values, as nnx takes them. Raises ValueError where names differ."""
    values = dict(_flat(params))
    if wrong := sorted(values.keys() ^ variables.keys(), key=_name):
        what = "not in the module" if wrong[0] in values else "missing"
        raise ValueError(f"parameter {_name(wrong[0])} is {what}")
    return nnx.from_flat_state([(path, variable.replace(values[path])) for path, variable in variables.items()])


def _flat(tree: Params, path: tuple = ()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield (*path, name), value


def _name(path: tuple) -> str:
    return ".".join(map(str, path))

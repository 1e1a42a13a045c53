# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 for sampling, through qwix (the optional extra `int8`).

A kernel becomes a `qwix.QArray`: int8 values, and a float32 scale for each output channel of each layer. It takes the
kernel's place in the tree, is sliced by scan and `unstack_layers` like any leaf, and `Dense` multiplies by it through
`qwix.dot_general`, with activations in the compute dtype. Compiled for TPU, decoding carries and reads the int8 values,
and makes floats of them inside the product. On CPU, XLA makes the floats once, before the first token: nothing is
saved there, neither time nor memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlp_jax.models.transformer import LanguageModel, Params


def quantise(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    """The same function with int8 kernels, rounded to nearest, symmetric: for decoding, not for gradients.

    A tied head is quantised too, a row of the table at a time, as a head of its own: it is the largest kernel a token
    reads. Looking tokens up reads few rows and stays exact, as do norms, biases, convolutions and Mamba's decays.

    Raises:
      ImportError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError("int8 weights need a library: pip install 'rlp_jax[int8]'") from error

    def leaf(path: tuple[Any, ...], value: jax.Array) -> Any:
        owner, name = (key.key for key in path[-2:])
        if name != "kernel" or owner == "conv":
            return value
        first = 0 if owner == "head" else 1  # after the axis of layers
        contracted = range(first, first + (2 if owner == "o" else 1))
        return qwix.quantize(value, jnp.int8, channelwise_axes=[i for i in range(value.ndim) if i not in contracted])

    if model.config.tie_embeddings:
        model = LanguageModel(dataclasses.replace(model.config, tie_embeddings=False))
        params = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    return model, jax.tree.map_with_path(leaf, params)

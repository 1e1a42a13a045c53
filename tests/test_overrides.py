# SPDX-License-Identifier: Apache-2.0
"""`--set`: every field's type is read, and what is wrong says what is right."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlp_jax.config import Config, ConfigError
from rlp_jax.nearest import suggest
from rlp_jax.overrides import override

FIELDS = [
    (f"{part.name}.{field.name}", getattr(Config(), part.name), field.name)
    for part in dataclasses.fields(Config())
    if dataclasses.is_dataclass(getattr(Config(), part.name))
    for field in dataclasses.fields(getattr(Config(), part.name))
]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rlp.group_size=two", "rlp.group_size is 'two': write a whole number, for instance rlp.group_size=16"),
        ("rlp.group_size=2.5", "write a whole number, for instance rlp.group_size=16"),
        ("rlp.temperature=hot", "rlp.temperature is 'hot': write a number, for instance rlp.temperature=0.7"),
        ("rlp.normalise=maybe", "write true or false, for instance rlp.normalise=false"),
        ("rlp.position_mode=entropi", "choose one of uniform, span, entropy (did you mean entropy?), for instance"),
        (
            "optimizer.final_learning_rate=low",
            "write a number, or none, for instance optimizer.final_learning_rate=1e-6",
        ),
        ("rlp.rollout_dtype=int4", "choose one of float32, bfloat16, int8 (did you mean int8?), or none"),
        ("rlp.grup_size=8", "unknown setting 'rlp.grup_size': did you mean rlp.group_size"),
        ("learning_rate=1", "did you mean optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "did you mean optimizer.learning_rate"),
        ("modle=x", "did you mean model"),
    ],
)
def test_what_is_wrong_says_what_is_right(assignment, message):
    with pytest.raises(ConfigError) as error:
        override(Config(), [assignment])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "part", "field"), FIELDS, ids=[name for name, *_ in FIELDS])
def test_every_example_given_is_one_that_works(name, part, field):
    """A value that is refused is answered with an assignment; typing that very assignment is accepted."""
    try:
        override(Config(), [f"{name}=\0"])
    except ConfigError as error:
        override(Config(), [str(error).rsplit("for instance ", 1)[1]])


@given(st.text())
def test_any_text_is_a_setting_or_one_line(text):
    for name in ("rlp.group_size", "rlp.temperature", "rlp.normalise", "remat", "data.sources", "optimizer.beta1"):
        try:
            override(Config(), [f"{name}={text}"])
        except ConfigError as error:
            assert name in str(error)


def test_nothing_near_lists_what_there_is():
    assert suggest("zzz", ["alpha", "beta"]) == ": there are alpha, beta"
    assert suggest("alpa", ["alpha", "beta"]) == ": did you mean alpha?"
    assert suggest("zzz", []) == ""

# SPDX-License-Identifier: Apache-2.0
"""`--set FIELD=VALUE`: a text becomes a setting of its field's type, or one line says what the field takes."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from rlp_jax.config import Config, ConfigError
from rlp_jax.nearest import suggest


def override(config: Config, assignments: Iterable[str]) -> Config:
    """The config with `field=value` and `section.field=value` applied, each value read as its field's type.

    Raises:
      ConfigError: an unknown field (with the nearest names) or a value that its type does not allow.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write field=value, for instance rlp.group_size=8")
        config = _replace(config, name.strip(), name.strip().split("."), text)
    return config


def _replace(node: Any, name: str, path: list[str], text: str) -> Any:
    hints = typing.get_type_hints(type(node))
    head, *rest = path
    if head not in hints:
        prefix = name.removesuffix(".".join(path))
        near = suggest(name, [prefix + hint for hint in hints] + ([] if prefix else _all_fields()))
        raise ConfigError(f"unknown setting {name!r}{near}")
    value = getattr(node, head)
    if dataclasses.is_dataclass(value):
        if not rest:
            raise ConfigError(f"{name} is a group of settings: set one of {', '.join(_field_names(value))}")
        return dataclasses.replace(node, **{head: _replace(value, name, rest, text)})
    if rest:
        raise ConfigError(f"unknown setting {name!r}: {name.removesuffix('.' + '.'.join(rest))} has no parts")
    try:
        return dataclasses.replace(node, **{head: _parse(hints[head], text)})
    except _NotOf as error:
        example = f"{name}={_example(value, hints[head])}"
        raise ConfigError(f"{name} is {text!r}: {error}, for instance {example}") from None


class _NotOf(ValueError):
    """A text that is no value of a type: the message says what is."""


def _parse(hint: Any, text: str) -> Any:
    """The text as a value of the annotated type. Raises _NotOf."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in args:
            near = difflib.get_close_matches(text, args, n=1)
            raise _NotOf(f"choose one of {', '.join(args)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return text
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in args:
            return None
        try:
            return _parse(next(arg for arg in args if arg is not type(None)), text)
        except _NotOf as error:
            raise _NotOf(f"{error}, or none") from None
    if origin is tuple:
        return tuple(_parse(args[0], part.strip()) for part in text.split(",") if part.strip())
    if hint is bool:
        values = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() not in values:
            raise _NotOf("write true or false")
        return values[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise _NotOf("write a whole number" if hint is int else "write a number") from None
    return text


def _example(value: Any, hint: Any) -> str:
    """The value that a field has, as it would be written on the command line; of a field without one, any."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        choices = typing.get_args(kinds[0])
        return choices[0] if choices else {int: "1", float: "1e-6"}.get(kinds[0], "none")
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or ("1,2" if typing.get_args(hint)[0] in (int, float) else "a,b")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _field_names(node: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(node)]


def _all_fields() -> list[str]:
    parts = ((name, getattr(Config(), name)) for name in _field_names(Config()))
    names = ([f"{name}.{field}" for field in _field_names(part)] if dataclasses.is_dataclass(part) else [name]
             for name, part in parts)  # fmt: skip
    return [name for group in names for name in group]

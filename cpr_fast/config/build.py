"""Converts plain TOML or JSON data to nested dataclasses and checks the type of every value."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from cpr_fast.config.sections import ConfigError, with_cycle


def build(kind: Any, value: Any, where: str) -> Any:
    """Converts `value`, plain TOML or JSON data, to the type `kind`.

    Args:
        kind: A dataclass, or the type of one of its fields.
        value: The data.
        where: The key of the value, for error messages; "" for the whole config.

    Raises ConfigError, which states the key, what was found and what was expected.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{with_cycle(where) or 'config'}: expected a table, got {value!r}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                close = difflib.get_close_matches(key, hints, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                named = with_cycle(_join(where, key), repr(_join(where, key)))
                raise ConfigError(f"unknown key {named}; {hint}valid keys: {', '.join(hints)}")
        arguments = {key: build(hints[key], item, _join(where, key)) for key, item in value.items()}
        missing = [
            f.name
            for f in dataclasses.fields(kind)
            if f.name not in arguments and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{with_cycle(where)}: missing {', '.join(map(repr, missing))}")
        return kind(**arguments)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{with_cycle(where)}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{with_cycle(where)}: expected a list, got {value!r}")
        return tuple(build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if origin in (types.UnionType, typing.Union):  # the latter with a Literal
        return _build_one_of(args, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{with_cycle(where)}: expected {kind.__name__}, got {value!r}")
    return value


def _build_one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Converts a value of one of several types: None, a word of a Literal, or the first type."""
    if value is None and types.NoneType in kinds:
        return None
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    if isinstance(value, str) and value in words:
        return value
    if words and kinds[0] is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"{with_cycle(where)}: expected int or {', '.join(map(repr, words))}, got {value!r}")
    return build(kinds[0], value, where)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key

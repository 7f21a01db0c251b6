"""Policies as plain data and as TOML text.

```toml
default = "quartet"

[[rule]]
pattern = "*.down_proj"
role = ["dgrad", "wgrad"]
shape = "k >= 4096"
recipe = "mine"                  # "none" leaves the matmul in high precision

[recipe.mine]
fprop = {a = "e2m1/32 e8m0 ceil nearest", b = "e2m1/32 e8m0 ceil nearest"}
dgrad = {a = "e2m1/32 e8m0 ceil nearest", b = "e2m1/32 e8m0 ceil nearest", source = "saved", rotation = "H32 random"}
```
A rotation is ``"H32"``, ``"H32 random"`` (fresh signs every step) or ``"H16 +++-+-…"`` (fixed signs). The standard
library reads TOML and does not write it, so the writer is here.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from quartet.kernels.spec import QuantSpec, SpecError
from quartet.lowering.recipe.types import Delayed, Gemm, Operand, Recipe, Rotation, Saved
from quartet.recipes import PolicyError, check, unknown


def _kind(hint: Any) -> Any:
    """The type of a field, without None and without what a tuple holds."""
    (kind,) = (kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not NoneType)
    return get_origin(kind) or kind


KINDS = {name: _kind(hint) for name, hint in get_type_hints(Recipe).items() if name != "name"}  # of a recipe's fields
_PARSED: dict[Any, Callable[[str], Any]] = {Delayed: Delayed.parse, Saved: Saved.parse}  # those written as text
_GEMM_KEYS = ("a", "b", "source", "rotation", "outer")


def within(prefix: tuple[str | int, ...], make: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``make(…)``, with the path of its PolicyError extended by ``prefix``."""
    try:
        return make(*args, **kwargs)
    except PolicyError as error:
        raise error.under(*prefix) from None


def typed(data: Mapping[str, Any], key: str, kind: type, what: str) -> Any:
    """``data[key]``, empty where it is left out. Raises PolicyError for another type."""
    value = data.get(key, kind() if kind is list else {})
    if not isinstance(value, kind):
        raise PolicyError(f"{key!r} is {what}, not {type(value).__name__} {value!r}", (key,))
    return value


def check_table(what: str, data: object, legal: tuple[str, ...]) -> Mapping[str, Any]:
    """``data`` if it is a mapping with legal keys only, otherwise PolicyError."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"{what} is a table with the keys {', '.join(legal)}, not {type(data).__name__} {data!r}")
    for key in data:
        if key not in legal:
            raise unknown(f"key in {what}:", key, legal, (key,))
    return data


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data of a recipe without its name; fields at their default are left out."""
    data: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "name" or value == field.default:
            continue
        data[field.name] = (_gemm_to_dict(value) if isinstance(value, Gemm) else
                            str(value) if type(value) in _PARSED else value)
    return data


def recipe_from_dict(name: str, data: object) -> Recipe:
    """The inverse of ``recipe_to_dict``. Raises PolicyError."""
    table = check_table(f"recipe {name!r}", data, tuple(KINDS))
    values: dict[str, Any] = {}
    for key, value in table.items():
        kind = str if KINDS[key] in _PARSED else KINDS[key]
        if kind is Gemm:
            values[key] = _gemm_from_dict(f"{key} of recipe {name!r}", value, key)
        elif kind is tuple:
            values[key] = tuple(value) if isinstance(value, list | tuple) else value
        elif not isinstance(value, kind):
            raise PolicyError(f"{key} of recipe {name!r} is a {kind.__name__}, not {type(value).__name__} {value!r}",
                              (key,))
        else:
            values[key] = value
    try:
        values |= {key: _PARSED[KINDS[key]](text) for key, text in values.items() if KINDS[key] in _PARSED}
        return check(Recipe(name=name, **values))
    except SpecError as error:
        raise PolicyError(str(error)) from None


def _gemm_to_dict(gemm: Gemm) -> dict[str, str]:
    data = {"a": _spec_to_text(gemm.a.spec), "b": _spec_to_text(gemm.b.spec)}
    if gemm.b.source != "original":
        data["source"] = gemm.b.source
    for key in ("rotation", "outer"):
        if (rotation := getattr(gemm, key)) is not None:
            data[key] = _rotation_to_text(rotation)
    return data


def _gemm_from_dict(what: str, data: object, role: str) -> Gemm:
    try:
        table = check_table(what, data, _GEMM_KEYS)
    except PolicyError as error:
        raise error.under(role) from None
    for key, value in table.items():
        if not isinstance(value, str):
            raise PolicyError(f"{key} of {what} is a string, not {type(value).__name__} {value!r}", (role, key))
    for key in ("a", "b"):
        if key not in table:
            raise PolicyError(f"{what} has no operand {key!r}; give a quantiser such as 'e2m1/32 e8m0 ceil nearest'",
                              (role,))
    try:
        a, b = (None if table[key] == "none" else QuantSpec.parse(table[key]) for key in ("a", "b"))
        rotations = (_rotation_from_text(table[key]) if key in table else None for key in ("rotation", "outer"))
        return Gemm(Operand(a), Operand(b, table.get("source", "original")), *rotations)
    except SpecError as error:
        raise PolicyError(f"{what}: {error}", (role,)) from None


def _spec_to_text(spec: QuantSpec | None) -> str:
    return "none" if spec is None else str(spec)


def _rotation_to_text(rotation: Rotation) -> str:
    if isinstance(rotation.signs, str):
        return f"H{rotation.n}" if rotation.signs == "none" else f"H{rotation.n} {rotation.signs}"
    return f"H{rotation.n} {''.join('+' if sign == 1 else '-' for sign in rotation.signs)}"


def _rotation_from_text(text: str) -> Rotation:
    found = re.fullmatch(r"H(\d+)(?: (\w+|[+-]+))?", text)
    if found is None:
        raise SpecError(f"cannot read rotation {text!r}; expected 'H32', 'H32 random' or 'H32 ' and 32 signs + or -")
    signs = found[2] or "none"
    return Rotation(int(found[1]), tuple(1 if s == "+" else -1 for s in signs) if signs[0] in "+-" else signs)


def write(data: Mapping[str, Any]) -> str:
    """TOML of the data of a policy: values, then lists of tables, then tables of tables."""
    tables = {key: value for key, value in data.items()
              if isinstance(value, Mapping) or (isinstance(value, list) and isinstance(value[0], Mapping))}
    blocks = [_lines({key: value for key, value in data.items() if key not in tables})]
    for key, value in tables.items():
        if isinstance(value, list):
            blocks += [f"[[{key}]]\n{_lines(table)}" for table in value]
        else:
            blocks += [f"[{key}.{_key(name)}]\n{_lines(table)}" for name, table in value.items()]
    return "\n".join(blocks)


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in table.items())


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read(text: str, where: str) -> dict[str, Any]:
    """The data in a TOML text. Raises PolicyError that names ``where`` and the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = str(error).replace("at end of document", f"at the end, line {text.count(chr(10)) + 1}")
        raise PolicyError(f"{where} is not valid TOML: {problem}") from None


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """The line (from 1) of the statement that first defines ``path``, or its nearest ancestor, in valid TOML.

    Reads ever longer prefixes, so that only the real parser decides what a statement is.
    """
    lines = text.split("\n")
    whole = tomllib.loads(text)
    while path and not _has(whole, path):
        path = path[:-1]
    begin = 0
    for end in range(1, len(lines) + 1):
        try:
            data = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if _has(data, path):
            break
        begin = end
    return begin + 1


def _has(data: Any, path: tuple[str | int, ...]) -> bool:
    for step in path:
        if isinstance(data, Mapping) and step in data:
            data = data[step]
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return False
    return True

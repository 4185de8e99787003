# SPDX-License-Identifier: Apache-2.0
"""JSON that somebody else has written, and dataclasses from it: each field of its type, or an error.

Standard library only.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NoReturn

_PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}
"""JSON's types of fields that are no list and no object; a bool is no int there."""

_PAGE_SIZES = (4096, 16384, 65536)
_HEXADECIMAL = re.compile("0x(0|[1-9a-f][0-9a-f]*)")
_BYTES = re.compile("([0-9a-f]{2})*")
_MOST_ID = (1 << 31) - 1


def loads(text: str | bytes) -> Any:
    """JSON as its standard has it: UTF-8, each name of an object once, and numbers that are some.

    :raises ValueError, RecursionError: it is none
    """
    # Of bytes, json.loads would take other encodings, too.
    text = text.decode() if isinstance(text, bytes) else text
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are each there once: which of two values was meant, nobody can tell."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def known(kind: type, values: object) -> dict[str, Any]:
    """The fields of a dataclass that are in an object; other names are passed over.

    :raises TypeError: one is missing, or of another type
    """
    if not isinstance(values, dict):
        raise TypeError(f"its {kind.__name__.lower()} is no object")
    found = {}
    for one in fields(kind):
        if one.name in values:
            value, types = values[one.name], _PLAIN.get(str(one.type), (object,))
            right = isinstance(value, types) and (bool in types) >= isinstance(value, bool)
            if not right or (isinstance(value, float) and not math.isfinite(value)):
                raise TypeError(f"{one.name!r} in its {kind.__name__.lower()} is no {one.type}")
            found[one.name] = value
        elif one.default is MISSING and one.default_factory is MISSING:
            raise TypeError(f"its {kind.__name__.lower()} has no {one.name!r}")
    return found


def whole(value: object, most: int) -> int:
    """A number from 0 to the most that it can be.

    :raises ValueError: it is none, or another one
    """
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{_shown(value)} is no number from 0 to {most:#x}")
    return value


def hexadecimal(name: object, most: int) -> int:
    """The same from text, in the one way in which ``f"{number:#x}"`` writes it.

    :raises ValueError: it is none, or written in another way
    """
    if isinstance(name, str) and _HEXADECIMAL.fullmatch(name):
        return whole(int(name, 16), most)
    raise ValueError(f"{_shown(name)} is no hexadecimal number")


def items(value: object) -> list[tuple[str, Any]]:
    """The names and values of an object.

    :raises ValueError: it is none
    """
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} is no object")
    return list(value.items())


def bytes_of(text: object) -> bytes:
    """What ``bytes.hex`` wrote.

    :raises ValueError: it did not write this
    """
    if isinstance(text, str) and _BYTES.fullmatch(text):
        return bytes.fromhex(text)
    raise ValueError(f"{_shown(text)} are no hexadecimal bytes")


def line(text: object, most: int) -> str:
    """A text that can be shown: it has no line ends, nothing that a terminal obeys, and not too much.

    :raises ValueError: it is none
    """
    if isinstance(text, str) and text.isprintable() and len(text) <= most:
        return text
    raise ValueError(f"{_shown(text)} is no line of text")


def _shown(value: object) -> str:
    return reprlib.repr(value)


def threads(values: object) -> dict[int, tuple[int, str]]:
    """Thread id → (process id or 0, name).

    :raises ValueError, TypeError: they are not that
    """
    if not isinstance(values, dict):
        raise TypeError("its threads are no object")
    found = {int(tid): (int(pid), str(name)) for tid, (pid, name) in values.items()}
    if any(not 0 <= number <= _MOST_ID for tid, (pid, _) in found.items() for number in (tid, pid)):
        raise ValueError("a thread or process id is none")
    return found


def check_page_size(size: int) -> None:
    """Whether a host can have such pages.

    :raises ValueError: it cannot
    """
    if size not in _PAGE_SIZES:
        raise ValueError(f"its page size is {size}; it must be {', '.join(map(str, _PAGE_SIZES))}")

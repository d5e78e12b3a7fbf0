"""What all configs share: errors, checks, and conversion from and to dictionaries."""

import dataclasses
import json
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """A mistake in what the user asked for, in one to three lines: the key, what is wrong with it, and what to do."""


def closest(word: str, known) -> str:
    """Returns `"; did you mean 'x'?"` for the known word closest to `word`, or a list of the known ones."""
    known = [str(k) for k in known]
    match = get_close_matches(str(word), known, n=1)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; expected one of: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def require(condition: bool, key: str, expected: str, got: Any) -> None:
    """Raises UserError `key: expected ..., got ...` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, got {got!r}")


def one_line(error: Exception) -> str:
    """Returns the message of another library's error without line breaks, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool, NaN or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_count(value: Any, least: int) -> bool:
    """Whether a value is an int, not a bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def above_zero(config: Any, *keys: str) -> None:
    """Raises UserError unless these fields of `config` are numbers above 0."""
    for key in keys:
        value = getattr(config, key)
        require(is_number(value) and value > 0, key, "a number above 0", value)


class Config:
    """A dataclass that is built from a dictionary and turned into one; an unknown key is an error with the closest field."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = ""):
        """Builds the config from a plain dictionary; errors start with the key `where`, such as `pruning`."""
        where = where or cls.__name__
        require(isinstance(values, dict), where, "a mapping of fields to values", values)
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise UserError(f"{where}.{key}: there is no such field{closest(key, fields)}")
        for field in dataclasses.fields(cls):
            optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            if not optional and field.name not in values:
                raise UserError(f"{where}.{field.name}: this field is required but missing")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types; tuples become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def strings(config: Any, key: str, *, allow_empty: bool) -> None:
    """Checks that the field `key` holds a string or a sequence of strings, and makes it a tuple."""
    value = getattr(config, key)
    value = (value,) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and any(isinstance(v, (bool, int, float)) for v in value):
        raise UserError(
            f"{key}: expected names, got {value!r}; put them in quotes, because YAML reads yes and 1 as other values"
        )
    good = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    require(good and (allow_empty or len(value) > 0), key, "a name or a list of names", value)
    require(len(set(value)) == len(value), key, "distinct names", value)
    object.__setattr__(config, key, tuple(value))

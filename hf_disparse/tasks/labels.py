"""Turns raw labels of any spelling into what a loss takes: ids, multi-hot vectors or floats."""

import math
import re
from collections import Counter
from typing import Any

from datasets import ClassLabel

from hf_disparse.config import TaskConfig, UserError

_TRUTHS = (("true", "false"), ("yes", "no"), ("positive", "negative"))


class LabelEncoder:
    """Turns the raw labels of one column into ids, multi-hot vectors or floats.

    A label may be a class's name or its id. If both are possible the name wins, so that stars 1 to 5 with `labels=("1", "2",
    "3", "4", "5")` mean what they say; classes named by numbers are never read as ids.

    Args:
        task: the classes and the problem type.
        feature: the column's feature. If a `ClassLabel`, alone or in a list, shares names with the task, in any case, its
            ids stand for its own names, because a data set may order them differently or have more of them.
    """

    def __init__(self, task: TaskConfig, feature: Any = None):
        self.task = task
        self.ids = {name: i for i, name in enumerate(task.labels)}
        self._lower = {name.lower(): i for i, name in enumerate(task.labels)}
        feature = getattr(feature, "feature", feature)  # a list's feature holds that of its elements
        self._holds_ids = isinstance(feature, ClassLabel)
        self._names = feature.names if self._holds_ids and self._shares(feature.names) else None
        numerals = [name for name in task.labels if re.fullmatch(r"[+-]?\d+(\.\d+)?", name)]
        self._takes_ids = self._names is None and not numerals
        counts = Counter(map(float, numerals))  # a file's 01 and 1.50 arrive as 1 and 1.5
        self._numbers = {float(name): self.ids[name] for name in numerals if counts[float(name)] == 1}

    def _shares(self, names: list[str]) -> bool:
        return any(name.lower() in self._lower for name in names)

    def missing(self, value: Any) -> bool:
        """Whether there is no label: None, NaN, -1 unless it names a class, or an empty list for token classification."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return True
        if self.task.problem_type == "token_classification":
            return value == []
        is_class = "-1" in self.ids or -1 in self._numbers
        return self.task.problem_type == "single_label_classification" and value == -1 and not is_class

    def encode(self, value: Any) -> int | float | list[float]:
        """Encodes the label of one example; for token classification, use `encode_class` on every word's."""
        if self.task.problem_type == "regression":
            return self._number(value)
        if self.task.problem_type == "multi_label_classification":
            return self._multi_hot(value)
        return self.encode_class(value)

    def encode_class(self, value: Any) -> int:
        """Returns the id of a class given by name or id."""
        if isinstance(value, float) and str(value) not in self.ids and value.is_integer():
            value = int(value)
        is_id = isinstance(value, int) and not isinstance(value, bool)
        if self._names and is_id and 0 <= value < len(self._names):
            value = self._names[value]
            if value not in self.ids and value.lower() in self._lower:
                return self._lower[value.lower()]
        if isinstance(value, (str, int, float)) and str(value) in self.ids:
            return self.ids[str(value)]
        if isinstance(value, bool):
            return self._class_of_bool(value)
        if isinstance(value, (int, float)) and value in self._numbers:
            return self._numbers[value]
        # An id may be a string, if another value made its column one of strings.
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if self._takes_ids and isinstance(number, int) and 0 <= number < len(self.ids):
            return int(number)
        raise self._error(value, f"one of {self._listed()}" + f" or an id in 0..{len(self.ids) - 1}" * self._takes_ids)

    def _class_of_bool(self, value: bool) -> int:
        """By name, because "yes" may come before "no"; True is class 1 only if no name decides."""
        for yes, no in _TRUTHS:
            if yes in self._lower or no in self._lower:
                name = yes if value else no
                if name in self._lower:
                    return self._lower[name]
                raise self._error(value, f"one of {self._listed()}, not a truth value")
        if self._takes_ids and int(value) < len(self.ids):
            return int(value)
        raise self._error(value, f"one of {self._listed()}")

    def _listed(self) -> str:
        return ", ".join(self.task.labels[:12]) + (", ..." if len(self.ids) > 12 else "")

    def _number(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._error(value, "a number") from None
        if not math.isfinite(number):
            raise self._error(value, "a finite number")
        return number

    def _multi_hot(self, value: Any) -> list[float]:
        """Encodes a list of names, one 0 or 1 per class, or the ids of a list of `ClassLabel`."""
        labels = list(value) if isinstance(value, (list, tuple)) else [value]
        bits = all(isinstance(v, (int, float)) and v in (0, 1) for v in labels)
        if bits and len(labels) == len(self.ids) and not self._holds_ids:
            return [float(v) for v in labels]
        hot = [0.0] * len(self.ids)
        for label in labels:
            known = label in self.ids if isinstance(label, str) else self._holds_ids
            if not known:
                names = f"a list with some of {self._listed()}, or {len(self.ids)} zeros and ones"
                raise self._error(value, f"{names} (CSV files cannot hold lists; use JSON lines)")
            hot[self.encode_class(label)] = 1.0
        return hot

    def _error(self, value: Any, expected: str) -> UserError:
        key = f"tasks.{self.task.name}"
        return UserError(f"{key}: expected {expected} in column '{self.task.label_column}', got {show(value)}")


def show(value: Any) -> str:
    """Returns `repr(value)`, shortened to fit a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""What a task is and where its data is."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from hf_disparse.config.base import Config, UserError, closest, is_count, is_number, require, strings

# The metrics of each problem type; the first one is the default.
METRICS = {
    "single_label_classification": ("accuracy", "f1", "matthews_correlation"),
    "multi_label_classification": ("f1", "accuracy"),
    "regression": ("pearson", "spearmanr"),
    "token_classification": ("accuracy", "f1"),
}


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """One task of a multitask model: the shape of its examples and its metrics.

    Args:
        name: letters, digits, `_` and `-`; it prefixes the metrics (`eval_<name>_accuracy`).
        columns: one or two text columns; for token classification, one column with lists of words.
        label_column: the column that holds the label.
        problem_type: transformers' own `single_label_classification`, `multi_label_classification` or `regression`,
            or `token_classification`.
        labels: names of the classes in the order of their ids; empty for regression.
        metric: one or several metrics, whose mean is the task's value. Default: the first of `METRICS[problem_type]`.
        weight: factor of this task's loss in training and in joint scores.
    """

    name: str
    columns: tuple[str, ...]
    label_column: str = "label"
    problem_type: str = "single_label_classification"
    labels: tuple[str, ...] = ()
    metric: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self):
        good_name = isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name)
        require(bool(good_name), "name", "letters, digits, '_' and '-'", self.name)
        if self.name == "average":
            raise UserError("name: 'average' is reserved for the mean over tasks; choose another name")
        if self.problem_type not in list(METRICS):  # a list, as a value from YAML may not be hashable
            raise UserError(f"problem_type: unknown value {self.problem_type!r}{closest(self.problem_type, METRICS)}")
        strings(self, "columns", allow_empty=False)
        most = 1 if self.problem_type == "token_classification" else 2
        require(len(self.columns) <= most, "columns", f"at most {most} for {self.problem_type}", list(self.columns))
        good_column = isinstance(self.label_column, str) and self.label_column
        require(bool(good_column), "label_column", "the name of a column", self.label_column)
        strings(self, "labels", allow_empty=True)
        if self.problem_type == "regression":
            require(not self.labels, "labels", "none for regression", list(self.labels))
        else:
            least = 1 if self.problem_type == "multi_label_classification" else 2
            require(len(self.labels) >= least, "labels", f"the names of at least {least} classes", list(self.labels))
        known = METRICS[self.problem_type]
        strings(self, "metric", allow_empty=True)
        object.__setattr__(self, "metric", self.metric or known[:1])
        for metric in self.metric:
            if metric not in known:
                raise UserError(f"metric: {metric!r} does not fit {self.problem_type}{closest(metric, known)}")
        require(is_number(self.weight) and self.weight > 0, "weight", "a number above 0", self.weight)

    @property
    def num_labels(self) -> int:
        """Number of outputs of the head: the number of classes, or 1 for regression."""
        return len(self.labels) or 1


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where the data of one task is.

    Args:
        data: a Hub id or a folder that `datasets` reads, a CSV, JSON or Parquet file, `package:NAME/path` for a file
            in an installed package, or `demo:NAME` (see the docs on the quickstart's data).
        subset: name of the data set's configuration, such as `rte` of `nyu-mll/glue`.
        train_split, validation_split: names of the splits; the slicing syntax of `datasets` works.
        validation_fraction: fraction of the training split to hold out, drawn with a seed, in place of a validation split.
        max_train_rows, max_validation_rows: largest number of labelled rows to use, after a seeded shuffle.
        options: more arguments of `datasets.load_dataset`, such as `{encoding: latin-1}` for a CSV file.
    """

    data: str
    subset: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_fraction: float | None = None
    max_train_rows: int | None = None
    max_validation_rows: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        good = isinstance(self.data, str) and self.data
        require(bool(good), "data", "a Hub id, a path or package:NAME/path", self.data)
        require(self.subset is None or isinstance(self.subset, str), "subset", "a name", self.subset)
        for key in ("train_split", "validation_split"):
            require(isinstance(getattr(self, key), str), key, "the name of a split", getattr(self, key))
        part = self.validation_fraction
        require(part is None or (is_number(part) and 0 < part < 1), "validation_fraction", "a number in (0, 1)", part)
        for key in ("max_train_rows", "max_validation_rows"):
            value = getattr(self, key)
            require(value is None or is_count(value, 1), key, "a whole number of at least 1", value)
        good = isinstance(self.options, dict) and all(isinstance(k, str) for k in self.options)
        require(good, "options", "a mapping of argument names", self.options)

"""What a user asks for, as frozen dataclasses that refuse nonsense at birth.

Layer 0: nothing here knows torch or transformers.
"""

import dataclasses
import json
import re
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

PRUNING_CONFIG_NAME = "pruning_config.json"
FORMAT_VERSION = 1

CRITERIA = ("magnitude", "snip", "disparse", "fisher", "random")
DECISIONS = ("unanimous", "quorum", "joint", "sum", "max", "mean_rank")
SCHEDULES = ("one_shot", "cubic")
GRANULARITIES = ("weight", "head", "neuron", "layer")

# The metrics that make sense for a problem type; the first one is the default.
METRICS = {
    "single_label_classification": ("accuracy", "f1", "matthews_correlation"),
    "multi_label_classification": ("f1", "accuracy"),
    "regression": ("pearson", "spearmanr"),
    "token_classification": ("accuracy", "f1"),
}


class UserError(ValueError):
    """A mistake in what the user asked for: one to three lines that name the key, what was expected, got, and to do."""


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
    """The message of someone else's error, without line breaks and cut to a few lines' length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_number(value: Any) -> bool:
    """True for an int or a float that is not a bool, NaN or infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_count(value: Any, least: int) -> bool:
    """True for an int (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Config:
    """Dictionaries in, dictionaries out; a key that is not a field is an error that names the closest field."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = ""):
        """Builds the config from a plain dictionary; `where` is the key to name in an error, such as `pruning`."""
        where = where or cls.__name__
        require(isinstance(values, dict), where, "a mapping of fields to values", values)
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise UserError(f"{where}.{key}: there is no such field{closest(key, fields)}")
        for field in dataclasses.fields(cls):
            optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
            if not optional and field.name not in values:
                raise UserError(f"{where}.{field.name}: this field is required and was not given")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _strings(config: Any, key: str, *, allow_empty: bool) -> None:
    """Turns a string or a sequence of strings in the field `key` into a tuple."""
    value = getattr(config, key)
    value = (value,) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and any(isinstance(v, (bool, int, float)) for v in value):
        raise UserError(f"{key}: expected names, got {value!r}; put them in quotes, as YAML reads yes and 1 otherwise")
    good = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    require(good and (allow_empty or len(value) > 0), key, "a name or a list of names", value)
    require(len(set(value)) == len(value), key, "names that differ from one another", value)
    object.__setattr__(config, key, tuple(value))


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """One task of a multitask model: what its examples look like and how it is judged.

    Args:
        name: letters, digits, `_` and `-`; prefixes the metrics (`eval_<name>_accuracy`).
        columns: the one or two text columns; for token classification the one column of word lists.
        label_column: the column that holds the label.
        problem_type: transformers' own `single_label_classification`, `multi_label_classification` or `regression`,
            or `token_classification`.
        labels: the names of the classes, in the order of their ids. None for regression.
        metric: one metric or several; a task's value is their mean. Default: the first of `METRICS[problem_type]`.
        weight: factor on this task's loss in training and in the joint score.
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
        if self.problem_type not in list(METRICS):  # a list, for what YAML gives may not be hashable
            raise UserError(f"problem_type: unknown value {self.problem_type!r}{closest(self.problem_type, METRICS)}")
        _strings(self, "columns", allow_empty=False)
        most = 1 if self.problem_type == "token_classification" else 2
        require(len(self.columns) <= most, "columns", f"at most {most} for {self.problem_type}", list(self.columns))
        good_column = isinstance(self.label_column, str) and self.label_column
        require(bool(good_column), "label_column", "a column's name", self.label_column)
        _strings(self, "labels", allow_empty=True)
        if self.problem_type == "regression":
            require(not self.labels, "labels", "none for regression", list(self.labels))
        else:
            least = 1 if self.problem_type == "multi_label_classification" else 2
            require(len(self.labels) >= least, "labels", f"the names of at least {least} classes", list(self.labels))
        known = METRICS[self.problem_type]
        object.__setattr__(self, "metric", self.metric or known[:1])
        _strings(self, "metric", allow_empty=False)
        for metric in self.metric:
            if metric not in known:
                raise UserError(f"metric: {metric!r} does not fit {self.problem_type}{closest(metric, known)}")
        require(is_number(self.weight) and self.weight > 0, "weight", "a number above 0", self.weight)

    @property
    def num_labels(self) -> int:
        """Width of the head: the number of classes, 1 for regression."""
        return len(self.labels) or 1


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where the examples of one task are.

    Args:
        data: a Hub id or a folder that `datasets` reads, a CSV, JSON or Parquet file, `package:NAME/path` for a file
            that an installed package carries, or `demo:NAME` (see the docs on the quickstart's data).
        subset: name of the data set's configuration, such as `rte` of `nyu-mll/glue`.
        train_split, validation_split: names of the splits, in the slicing syntax of `datasets`.
        validation_fraction: instead of a validation split, hold out this seeded random part of the training split.
        max_train_rows, max_validation_rows: cap, applied after a seeded shuffle.
        options: further arguments of `datasets.load_dataset`, such as `{encoding: latin-1}` for a CSV file.
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
        require(
            isinstance(self.data, str) and bool(self.data), "data", "a Hub id, a path or package:NAME/path", self.data
        )
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


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Config):
    """How a shared encoder is made sparse by scores: criterion, decision, schedule.

    Args:
        sparsity: fraction of the prunable weights that ends up zero, in [0, 1); of the parts with another granularity.
        granularity: what goes: `weight`, or one or several of `head` (of attention), `neuron` (of the FFN) and `layer`, of
            each of which `sparsity` is pruned, but for the best one of its layer.
        criterion: how one task scores a weight: `magnitude`, `snip` |w g|, `disparse` |g| w^2, `fisher` g^2 w^2 / 2, or
            `random`.
        decision: how the tasks' scores become one mask: `unanimous` (a weight goes only if all tasks spare it),
            `quorum` (it stays if at least `quorum` tasks want it), `sum` and `max` of the normalised scores,
            `mean_rank`, or `joint` (the losses are summed first: the control without disentangling).
        quorum: how many tasks must want a weight; only with `decision="quorum"`.
        schedule: `one_shot` at `start_step`, or `cubic` from `start_step` to `end_step`, scoring anew at each step.
        start_step, end_step, update_every: in optimizer steps; the last two only with `schedule="cubic"`.
        score_batches: batches per task behind each scoring.
        target_modules, exclude_modules: which Linear modules of the encoder to prune, with PEFT's meaning: a string is
            a regular expression for the whole name, a list holds names or their endings. Default: all in its layers.
        seed: of the random criterion and of the order of the scoring batches.
    """

    method: ClassVar[str] = "saliency"

    sparsity: float = 0.8
    granularity: str | tuple[str, ...] = "weight"
    criterion: str = "disparse"
    decision: str = "unanimous"
    quorum: int = 1
    schedule: str = "one_shot"
    start_step: int = 0
    end_step: int | None = None
    update_every: int = 100
    score_batches: int = 32
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        require(is_number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", "a number in [0, 1)", self.sparsity)
        for key, known in (("criterion", CRITERIA), ("decision", DECISIONS), ("schedule", SCHEDULES)):
            if getattr(self, key) not in known:
                raise UserError(f"{key}: unknown value {getattr(self, key)!r}{closest(getattr(self, key), known)}")
        for key, least in (("quorum", 1), ("start_step", 0), ("update_every", 1), ("score_batches", 1), ("seed", 0)):
            value = getattr(self, key)
            good = is_count(value, least) and value < 2**32
            require(good, key, f"a whole number of at least {least} and below 2^32", value)
        fits = self.quorum == 1 or self.decision == "quorum"
        require(fits, "quorum", f"1 with decision '{self.decision}' (set decision: quorum)", self.quorum)
        if self.schedule == "cubic":
            good_end = is_count(self.end_step, self.start_step + 1)
            require(
                good_end, "end_step", f"a step after start_step {self.start_step} for schedule cubic", self.end_step
            )
        else:
            require(self.end_step is None, "end_step", "nothing with schedule one_shot", self.end_step)
        _strings(self, "granularity", allow_empty=False)
        for kind in self.granularity:
            if kind not in GRANULARITIES:
                raise UserError(f"granularity: unknown value {kind!r}{closest(kind, GRANULARITIES)}")
        alone = "weight" not in self.granularity or self.granularity == ("weight",)
        require(alone, "granularity", "weight alone, or parts", list(self.granularity))
        for key in ("target_modules", "exclude_modules"):
            value = getattr(self, key)
            fits = value is None or not self.prunes_parts
            require(fits, key, "nothing where parts are pruned, which go as a whole", value)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except (re.error, OverflowError) as error:
                    raise UserError(f"{key}: not a regular expression: {error}") from None
            elif value is not None:
                _strings(self, key, allow_empty=False)

    @property
    def prunes_parts(self) -> bool:
        """True if heads, neurons or layers go as a whole."""
        return self.granularity != ("weight",)

    def to_dict(self) -> dict[str, Any]:
        """The fields, the method's name and the version of the format."""
        return {"method": self.method, "version": FORMAT_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> "PruningConfig":
        """The config of the method that `values` names; fields unknown to this version warn if a newer one wrote them."""
        values = dict(values) if isinstance(values, dict) else values
        if isinstance(values, dict):
            method, version = values.pop("method", cls.method), values.pop("version", FORMAT_VERSION)
            where = where or cls.__name__
            target = _method_class(method, where)
            known = {f.name for f in dataclasses.fields(target)}
            newer = [k for k in values if k not in known] if is_count(version, FORMAT_VERSION + 1) else []
            for key in newer:
                warnings.warn(f"{where}: ignoring '{key}' of format version {version} > {FORMAT_VERSION}", stacklevel=2)
                values.pop(key)
            if target is not cls:
                return super(PruningConfig, target).from_dict(values, where)
        return super().from_dict(values, where)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `pruning_config.json` into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, PRUNING_CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_arguments) -> "PruningConfig":
        """Reads `pruning_config.json` from a folder, or from the Hub (`hub_arguments` go to `hf_hub_download`)."""
        path = Path(name_or_path, PRUNING_CONFIG_NAME)
        if not Path(name_or_path).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(name_or_path), PRUNING_CONFIG_NAME, **hub_arguments))
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; was this model pruned by hf_disparse?")
        try:
            values = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: expected JSON, got a file that does not parse ({error})") from None
        return cls.from_dict(values, where=PRUNING_CONFIG_NAME)


def _method_class(method: str, where: str) -> type[PruningConfig]:
    """PruningConfig or the subclass whose `method` is the one asked for."""
    classes, todo = {}, [PruningConfig]
    while todo:
        one = todo.pop()
        classes[one.method] = one
        todo += one.__subclasses__()
    if method not in list(classes):  # a list, for what JSON gives may not be hashable
        raise UserError(f"{where}.method: unknown value {method!r}{closest(method, classes)}")
    return classes[method]

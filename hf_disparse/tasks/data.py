"""From what a user names to tokenized examples: finding the data, checking columns and labels, tokenizing."""

import importlib.util
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from hf_disparse.config import DataConfig, TaskConfig, UserError, closest
from hf_disparse.tasks import demo

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def resolve(reference: str) -> str:
    """`package:NAME/path` as the path of that file of an installed package; anything else as it is.

    The package is located, not imported: none of its code runs.

    Raises:
        UserError: the package is not installed, the file is not there, or the path leaves the package.
    """
    if not reference.startswith("package:"):
        return reference
    name, _, inner = reference.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name.replace("-", "_")) if name.replace("-", "_").isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{reference}: the package '{name}' is not installed; try: pip install {name.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise UserError(f"{reference}: the package '{name}' carries no file '{inner}'")
    return str(path)


def load_task(task: TaskConfig, data: DataConfig, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Loads the raw training and validation examples of a task, capped, with their columns checked.

    Raises:
        UserError: data, file, split or column that is not there, or a split without examples.
    """
    if data.validation_fraction is None:
        train, validation = (_load_split(task, data, s) for s in (data.train_split, data.validation_split))
    else:
        train = _load_split(task, data, data.train_split)
        parts = train.train_test_split(test_size=data.validation_fraction, seed=seed)
        train, validation = parts["train"], parts["test"]
    train = _cap(train, data.max_train_rows, seed)
    validation = _cap(validation, data.max_validation_rows, seed)
    for split, rows in (("training", train), ("validation", validation)):
        for column in (*task.columns, task.label_column):
            if column not in rows.column_names:
                raise UserError(f"tasks.{task.name}: there is no column '{column}'{closest(column, rows.column_names)}")
        if len(rows) == 0:
            raise UserError(f"tasks.{task.name}: expected at least one {split} example, got none from {data.data}")
    return train, validation


def _load_split(task: TaskConfig, data: DataConfig, split: str) -> Dataset:
    where = f"tasks.{task.name}.data"
    if data.data.startswith("demo:"):
        splits = demo.load(data.data.removeprefix("demo:"), where)
    else:
        source = resolve(data.data)
        builder = _BUILDERS.get(Path(source).suffix.lower())
        if builder and not Path(source).is_file():
            raise UserError(f"{where}: expected a file, but there is none at {source}")
        try:
            arguments = dict(path=builder, data_files=source) if builder else dict(path=source, name=data.subset)
            splits = load_dataset(**arguments, **data.options)
        except (OSError, ValueError, TypeError, UnicodeError, DatasetsError) as error:
            raise UserError(
                f"{where}: expected data that `datasets` loads, got {_one_line(error)} for {source}"
            ) from None
    name = split.partition("[")[0]
    if not isinstance(splits, DatasetDict) or name not in splits:
        raise UserError(f"tasks.{task.name}: there is no split '{name}'{closest(name, splits)}")
    if name == split:
        return splits[name]
    try:
        return _slice(splits[name], split[len(name) :])
    except ValueError:
        raise UserError(f"tasks.{task.name}: expected a split such as train[:80%], got '{split}'") from None


def _slice(rows: Dataset, part: str) -> Dataset:
    """`[from:to]` in rows or per cent, as in the split syntax of `datasets`."""
    if not (part.startswith("[") and part.endswith("]") and part.count(":") == 1):
        raise ValueError(part)

    def position(text: str, default: int) -> int:
        if not text:
            return default
        at = round(len(rows) * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(max(at + len(rows) if at < 0 else at, 0), len(rows))

    first, last = part[1:-1].split(":")
    return rows.select(range(position(first, 0), position(last, len(rows))))


def _cap(rows: Dataset, most: int | None, seed: int) -> Dataset:
    return rows if most is None or most >= len(rows) else rows.shuffle(seed=seed).select(range(most))


def tokenize(
    rows: Dataset, task: TaskConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """Turns raw examples into model inputs and `labels`; texts longer than `max_length` tokens are truncated.

    Returns:
        The tokenized examples and the number of unlabelled ones (None or -1) that were left out.

    Raises:
        UserError: a label outside the task's classes, a text that is no string, or no labelled example at all.
    """
    labels = _Labels(task, rows)
    encode = _encode_tokens if task.problem_type == "token_classification" else _encode_texts
    batches = {"batched": True, "load_from_cache_file": False, "desc": f"tokenizing {task.name}"}
    raw = rows[task.label_column]
    labelled = [i for i, value in enumerate(raw) if not labels.missing(value)]
    left_out = len(rows) - len(labelled)
    if not labelled:
        raise UserError(
            f"tasks.{task.name}: expected labelled examples, got {left_out} without a label in '{task.label_column}'"
        )
    rows = rows.select(labelled) if left_out else rows
    done = rows.map(
        lambda b: encode(b, task, tokenizer, max_length, labels), remove_columns=rows.column_names, **batches
    )
    return done, left_out


def _encode_texts(batch, task, tokenizer, max_length, labels) -> dict[str, list]:
    texts = [batch[column] for column in task.columns]
    for column, values in zip(task.columns, texts, strict=True):
        for value in values:
            if not isinstance(value, str):
                raise UserError(f"tasks.{task.name}: expected text in column '{column}', got {value!r}")
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    encoded["labels"] = [labels.encode(value) for value in batch[task.label_column]]
    return encoded


def _encode_tokens(batch, task, tokenizer, max_length, labels) -> dict[str, list]:
    """A word's label stands on its first token; the others and the special ones have -100, which the loss ignores."""
    words = batch[task.columns[0]]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    aligned = []
    for row, values in enumerate(batch[task.label_column]):
        if len(values) != len(words[row]):
            raise UserError(
                f"tasks.{task.name}: expected a label per word, got {len(values)} for {len(words[row])} words"
            )
        ids, previous = [], None
        for word in encoded.word_ids(row):
            ids.append(-100 if word is None or word == previous else labels.encode_class(values[word]))
            previous = word
        aligned.append(ids)
    return {**encoded, "labels": aligned}


class _Labels:
    """Turns raw labels into ids, multi-hot vectors or floats."""

    def __init__(self, task: TaskConfig, rows: Dataset):
        self.task = task
        self.ids = {name: i for i, name in enumerate(task.labels)}
        feature = rows.features.get(task.label_column)
        names = feature.names if isinstance(feature, ClassLabel) else None
        # A data set that names its classes otherwise, or in another order, is followed by name where the names agree.
        self.order = [self.ids[n] for n in names] if names and set(names) == set(task.labels) else None

    def missing(self, value: Any) -> bool:
        return value is None or (value == -1 and self.task.problem_type == "single_label_classification")

    def encode(self, value: Any) -> int | float | list[float]:
        if self.task.problem_type == "regression":
            try:
                return float(value)
            except (TypeError, ValueError):
                raise self._error(value, "a number") from None
        if self.task.problem_type == "multi_label_classification":
            return self._multi_hot(value)
        return self.encode_class(value)

    def encode_class(self, value: Any) -> int:
        if isinstance(value, str) and value in self.ids:
            return self.ids[value]
        whole = isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer())
        if whole and 0 <= int(value) < len(self.ids):
            return self.order[int(value)] if self.order else int(value)
        raise self._error(value, f"one of {', '.join(self.ids)} or an id in 0..{len(self.ids) - 1}")

    def _multi_hot(self, value: Any) -> list[float]:
        """From a list of names, or from one 0 or 1 per class."""
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        if not any(isinstance(v, str) for v in value) and len(value) == len(self.ids) and set(value) <= {0, 1}:
            return [float(v) for v in value]
        hot = [0.0] * len(self.ids)
        for label in value:
            if not isinstance(label, str):
                raise self._error(value, f"names of classes, or {len(self.ids)} zeros and ones")
            hot[self.encode_class(label)] = 1.0
        return hot

    def _error(self, value: Any, expected: str) -> UserError:
        return UserError(
            f"tasks.{self.task.name}: expected {expected} in column '{self.task.label_column}', got {value!r}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""From a data set's name to tokenized examples: loading, checking columns and labels, tokenizing."""

import glob
import os
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import CsvConfig
from transformers import PreTrainedTokenizerBase

from hf_disparse.config import DataConfig, TaskConfig, UserError, closest, is_count, one_line, require
from hf_disparse.files import resolve
from hf_disparse.tasks import demo
from hf_disparse.tasks.labels import LabelEncoder, show

# In a CSV file only an empty cell is missing: pandas would silently drop the labels "None" and "NA", which are usually names
# of classes or texts. Nor is the first column an index if rows have one field more than the header: pandas would shift all
# columns by one.
_CSV = {"keep_default_na": False, "na_values": [""], "index_col": False}
_BUILDERS = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# The options of `load_dataset` that choose which files are read.
_CHOOSE_FILES = ("cache_dir", "data_dir", "data_files", "revision", "token")
Split = tuple[Dataset, str, range]
_NO_OPTIONS = {
    "path": "use data",
    "name": "use subset",
    "split": "use train_split and validation_split",
    "streaming": "the data is read as a whole",
}


def load_task(
    task: TaskConfig, data: DataConfig, seed: int = 0, splits: Sequence[str] = ("train", "validation")
) -> tuple[Dataset, ...]:
    """Loads a task's raw examples, capped and with their columns checked: one Dataset for each of `splits`.

    Raises:
        UserError: the data, a split or a column does not exist, a split is empty, or rows are both trained and validated on.
    """
    where = f"tasks.{task.name}"
    is_demo = data.data.startswith("demo:")
    stored, tabs = (_load_demo(data, where), False) if is_demo else _load_splits(data, where)
    if data.validation_fraction is not None:
        rows, _, _ = _split(stored, task, data, "train_split")
        found = dict(zip(("train", "validation"), _hold_out(rows, task, data.validation_fraction, seed), strict=True))
    else:
        loaded = {split: _split(stored, task, data, f"{split}_split") for split in splits}
        if len(loaded) == 2:
            _refuse_overlap(task, data, loaded["train"], loaded["validation"])
        found = {split: rows for split, (rows, _, _) in loaded.items()}
    capped = []
    for split in splits:
        _check_columns(found[split], task)
        if tabs:
            _refuse_swallowed(found[split], task, data)
        rows = _cap(found[split], task, getattr(data, f"max_{split}_rows"), seed)
        if len(rows) == 0:
            which = "training" if split == "train" else split
            raise UserError(f"tasks.{task.name}: expected at least one {which} example, got none from {data.data}")
        capped.append(rows)
    return tuple(capped)


def _refuse_overlap(task: TaskConfig, data: DataConfig, train: Split, validation: Split) -> None:
    """Refuses validation on rows that are also trained on."""
    (_, name, ours), (_, other, theirs) = train, validation
    if name == other and max(ours.start, theirs.start) < min(ours.stop, theirs.stop):
        raise UserError(
            f"tasks.{task.name}.validation_split: {data.validation_split} shares rows with train_split {data.train_split}; "
            "slice both, such as train[90%:] and train[:90%], or set validation_fraction"
        )


def _refuse_swallowed(rows: Dataset, task: TaskConfig, data: DataConfig) -> None:
    """Refuses a TSV file in which a text that begins with a quotation mark has swallowed the rows up to the next one."""
    if "quoting" in data.options:
        return
    for column in task.columns:
        for text in rows.with_format(None)[column]:
            if isinstance(text, str) and "\t" in text and "\n" in text:
                raise UserError(
                    f"tasks.{task.name}: a text in {data.data} spans several lines, {show(text)}; set options: {{quoting: 3}} if "
                    "quotation marks are ordinary characters, {quoting: 0} if they quote fields"
                )


def _check_columns(rows: Dataset, task: TaskConfig) -> None:
    for column in (*task.columns, task.label_column):
        if column not in rows.column_names:
            found = rows.column_names
            unsplit = len(found) == 1 and any(separator in found[0] for separator in ",;|\t")
            way_out = "; if the file has another separator, set options: {sep: ...}" if unsplit else ""
            raise UserError(f"tasks.{task.name}: there is no column '{column}'{closest(column, found)}{way_out}")
    if task.label_column in task.columns:
        raise UserError(
            f"tasks.{task.name}.label_column: must differ from the columns of texts, got '{task.label_column}'"
        )


def _hold_out(rows: Dataset, task: TaskConfig, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    try:
        parts = rows.train_test_split(test_size=fraction, seed=seed)
    except ValueError:
        raise UserError(
            f"tasks.{task.name}.validation_fraction: expected a fraction that leaves training examples, "
            f"got {fraction} of {len(rows)}"
        ) from None
    return parts["train"], parts["test"]


def _split(splits: DatasetDict, task: TaskConfig, data: DataConfig, key: str) -> Split:
    """Returns the rows that the field `key` of `data` asks for, the name of their split, and their positions in it."""
    where, split = f"tasks.{task.name}", getattr(data, key)
    name = split.partition("[")[0]
    if name not in splits:
        way_out = ", or set validation_fraction" if key == "validation_split" else ""
        raise UserError(f"{where}.{key}: there is no split '{name}'{closest(name, splits)}{way_out}")
    rows = splits[name]
    if name == split:
        return rows, name, range(len(rows))
    try:
        part = _positions(len(rows), split[len(name) :])
    except ValueError:
        raise UserError(f"{where}.{key}: expected a split such as train[:80%], got '{split}'") from None
    return rows.select(part), name, part


def _load_demo(data: DataConfig, where: str) -> DatasetDict:
    for key in ("subset", "options"):
        if getattr(data, key):
            raise UserError(f"{where}.{key}: must not be set with {data.data}, got {getattr(data, key)!r}")
    return demo.load(data.data.removeprefix("demo:"), f"{where}.data")


def _load_splits(data: DataConfig, where: str) -> tuple[DatasetDict, bool]:
    """All splits of a file, a folder or a Hub id, and whether tabs stand between the fields of its rows."""
    source = resolve(data.data)
    suffix = Path(source.removesuffix(".gz")).suffix.lower()
    builder, defaults = _BUILDERS.get(suffix, (None, {}))
    if builder and not Path(source).is_file():
        raise UserError(
            f"{where}.data: there is no file {Path(source).absolute()}; paths are relative to the current folder"
        )
    if not builder and Path(source).is_file():
        raise UserError(
            f"{where}.data: expected a file of type {', '.join(_BUILDERS)}, a folder or a Hub id, got {source}"
        )
    if builder and data.subset:
        raise UserError(f"{where}.subset: must not be set with a single file, got '{data.subset}'")
    for option, instead in _NO_OPTIONS.items():
        if option in data.options:
            raise UserError(f"{where}.options: '{option}' cannot be set here; {instead}")
    place = os.path.abspath(source) if Path(source).exists() else source
    if Path(place).is_dir():
        folder = os.path.realpath(os.path.join(place, str(data.options.get("data_dir") or "")))
        if folder != glob.escape(folder):  # `datasets` would read whatever matches the pattern
            raise UserError(
                f"{where}.data: `datasets` reads *, ? and [ in the path {folder} as a pattern; rename the folder, or name a "
                "single file"
            )
    named = {"path": builder, "data_files": glob.escape(place)} if builder else {"path": place, "name": data.subset}
    clash = [option for option in data.options if option in named]
    if clash:
        raise UserError(f"{where}.options: '{clash[0]}' cannot be set here; data names the file")
    try:
        with (
            warnings.catch_warnings()
        ):  # pandas only warns once about rows longer than the header, and drops their last fields
            warnings.filterwarnings("error", "Length of header or names does not match")
            options = {**(defaults if builder else _defaults(named, data.options)), **data.options}
            return load_dataset(**named, **options), (options.get("delimiter") or options.get("sep")) == "\t"
    except Exception as error:  # pandas, arrow, datasets and the Hub's clients raise a dozen kinds here
        if isinstance(error, DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # it says only that something went wrong
        way_out = ""
        if isinstance(error, UnicodeError):
            way_out = "\nName the file's encoding, such as options: {encoding: latin-1}."
        elif "config name is missing" in str(error).lower():
            way_out = f"\nName one of them in {where}.subset."
        elif str(error).startswith("Length of header"):
            way_out = "\nA row has more fields than the header: quote texts that hold the separator."
        elif data.options:
            way_out = f"\nCheck {where}.options: {show(data.options)}"
        raise UserError(
            f"{where}.data: expected data that `datasets` loads, got {source}: {one_line(error)}{way_out}"
        ) from None


def _defaults(named: dict[str, str | None], options: dict[str, Any]) -> dict[str, Any]:
    """Options for a folder or the Hub, where CSV and TSV files are read in the same way as a single file."""
    found = load_dataset_builder(**named, **{k: v for k, v in options.items() if k in _CHOOSE_FILES}).config
    return {**_CSV, "sep": found.delimiter or found.sep} if isinstance(found, CsvConfig) else {}


def _positions(size: int, part: str) -> range:
    """Parses `[from:to]`, in rows or per cent of `size` rows, as in the split syntax of `datasets`."""
    if not (part.startswith("[") and part.endswith("]") and part.count(":") == 1):
        raise ValueError(part)

    def position(text: str, default: int) -> int:
        if not text:
            return default
        at = round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(max(at + size if at < 0 else at, 0), size)

    first, last = part[1:-1].split(":")
    return range(position(first, 0), position(last, size))


def _cap(rows: Dataset, task: TaskConfig, most: int | None, seed: int) -> Dataset:
    """Takes rows of a seeded shuffle until `most` have a label; unlabelled rows stay among them and are counted later."""
    if most is None or most >= len(rows):
        return rows
    rows, labels = rows.shuffle(seed=seed), LabelEncoder(task, rows.features[task.label_column])
    labelled = accumulate(not labels.missing(value) for value in rows.with_format(None)[task.label_column])
    return rows.select(range(next((i for i, n in enumerate(labelled, 1) if n == most), len(rows))))


def tokenize(
    rows: Dataset, task: TaskConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """Turns raw examples into model inputs and `labels`; texts longer than `max_length` tokens are truncated.

    Returns:
        The tokenized examples, and the number of unlabelled ones left out: None, NaN or, for single-label classification,
        -1; for token classification, examples without words or of whose words none became a token.

    Raises:
        UserError: a column does not exist, a label is none of the task's classes, a text is not a string, or no example
            has a label.
    """
    require(is_count(max_length, 3), "max_length", "a whole number of at least 3", max_length)
    _check_columns(rows, task)
    # Without this, the rows' numpy or torch format, other columns and the types of columns named like outputs would remain.
    raw = {column: f"raw {column}" for column in (*task.columns, task.label_column)}
    rows = rows.with_format(None).select_columns([*raw]).rename_columns(raw)
    labels = LabelEncoder(task, rows.features[raw[task.label_column]])
    encode = _encode_texts
    if task.problem_type == "token_classification":
        _check_words(tokenizer)
        encode = _encode_tokens
    batches = {"batched": True, "load_from_cache_file": False, "desc": f"tokenizing {task.name}"}
    given = rows[raw[task.label_column]]
    labelled = [i for i, value in enumerate(given) if not labels.missing(value)]
    left_out = len(rows) - len(labelled)
    if not labelled:
        raise UserError(f"tasks.{task.name}: none of {left_out} examples has a label in '{task.label_column}'")
    rows = rows.select(labelled) if left_out else rows

    def encode_batch(batch) -> dict[str, list]:
        return encode({column: batch[name] for column, name in raw.items()}, task, tokenizer, max_length, labels)

    done = rows.map(encode_batch, remove_columns=rows.column_names, **batches)
    if task.problem_type == "token_classification":
        done = _with_a_label(done, task)
    return done, len(given) - len(done)


def _with_a_label(rows: Dataset, task: TaskConfig) -> Dataset:
    """Drops rows of whose words none became a token, because a batch of them would have no loss."""
    kept = [i for i, ids in enumerate(rows["labels"]) if any(label != -100 for label in ids)]
    if not kept:
        raise UserError(f"tasks.{task.name}: the tokenizer turns no word of any example into tokens")
    return rows if len(kept) == len(rows) else rows.select(kept)


def _encode_texts(batch, task, tokenizer, max_length, labels) -> dict[str, list]:
    texts = [batch[column] for column in task.columns]
    for column, values in zip(task.columns, texts, strict=True):
        for value in values:
            if not isinstance(value, str):
                way_out = "; remove such rows from the data" if value is None else ""
                raise UserError(f"tasks.{task.name}: expected text in column '{column}', got {show(value)}{way_out}")
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    encoded["labels"] = [labels.encode(value) for value in batch[task.label_column]]
    return encoded


def _check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that splits a word in a list differently from the same word in a text."""
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"tokenizer: token_classification needs a fast tokenizer, got the slow {kind}")
    inputs = tokenizer(["the", "the"], is_split_into_words=True), tokenizer("the the")
    listed, in_text = ([i for i, w in zip(x["input_ids"], x.word_ids(), strict=True) if w == 1] for x in inputs)
    if in_text and listed != in_text:  # the second word, because a text's first may differ
        raise UserError("tokenizer: token_classification needs a tokenizer with add_prefix_space=True")


def _encode_tokens(batch, task, tokenizer, max_length, labels) -> dict[str, list]:
    """Puts a word's label on its first token; other tokens, special ones included, get -100, which the loss ignores."""
    column = task.columns[0]
    for words, values in zip(batch[column], batch[task.label_column], strict=True):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"tasks.{task.name}: expected a list of words in column '{column}', got {show(words)}")
        if not isinstance(values, list) or len(values) != len(words):
            got = f"{len(values)} for {len(words)} words" if isinstance(values, list) else show(values)
            raise UserError(f"tasks.{task.name}: expected a label per word in column '{task.label_column}', got {got}")
    encoded = tokenizer(batch[column], is_split_into_words=True, truncation=True, max_length=max_length)
    aligned = []
    for row, values in enumerate(batch[task.label_column]):
        ids, previous = [], None
        for word in encoded.word_ids(row):
            ids.append(-100 if word is None or word == previous else labels.encode_class(values[word]))
            previous = word
        aligned.append(ids)
    return {**encoded, "labels": aligned}

"""Finding and loading a task's data: packages, files, folders, splits; every mistake is a short UserError."""

import os
import sys
from pathlib import Path

import datasets
import pandas
import pytest
from datasets import Dataset

from hf_disparse.config import DataConfig, TaskConfig, UserError
from hf_disparse.files import resolve
from hf_disparse.tasks.data import load_task, tokenize
from tests.helpers.glue import GLUE, needs_glue
from tests.helpers.tiny import tiny_tokenizer

TASK = TaskConfig(name="t", columns="text", labels=("no", "yes"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keeps what `datasets` caches out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def numbered(tmp_path):
    """A JSON Lines file of 20 texts, "0" to "19"."""
    path = tmp_path / "numbered.jsonl"
    Dataset.from_dict({"text": [str(i) for i in range(20)], "label": [i % 2 for i in range(20)]}).to_json(path)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that fails when imported, with a file in it and one outside."""
    folder = tmp_path / "carrier_of_data"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "inner" / "rows.csv").write_text("text,label\na,no\n")
    (tmp_path / "secret.csv").write_text("secret")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def load(path, task=TASK, **fields):
    """The training examples."""
    return load_task(task, DataConfig(data=str(path), **fields), splits=["train"])[0]


def texts(path, **fields):
    return load(path, **fields)["text"][:]


def refused(call, *args, **kwargs) -> str:
    """The text of the UserError that the call raises, which has at most three lines."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


# packages


def test_package_reference_is_found_without_importing_the_package(package):
    assert resolve("package:carrier_of_data/inner/rows.csv") == str(package / "inner" / "rows.csv")
    assert resolve("package:carrier-of-data/inner") == str(package / "inner")
    assert "carrier_of_data" not in sys.modules


def test_reference_that_is_no_package_stays_as_it_is():
    assert [resolve(r) for r in ("nyu-mll/glue", "../x.csv")] == ["nyu-mll/glue", "../x.csv"]


@pytest.mark.parametrize(
    "inner", ["../secret.csv", "inner/../../secret.csv", "//secret.csv", "/{tmp}/secret.csv", ".."]
)
def test_package_reference_cannot_leave_the_package(package, tmp_path, inner):
    reference = "package:carrier_of_data/" + inner.format(tmp=tmp_path)
    assert "the package 'carrier_of_data' has no file '" in refused(resolve, reference)


def test_package_reference_does_not_follow_a_link_out_of_the_package(package, tmp_path):
    os.symlink(tmp_path / "secret.csv", package / "link.csv")
    assert "has no file 'link.csv'" in refused(resolve, "package:carrier_of_data/link.csv")


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("package:not_there_at_all/x.csv", "'not_there_at_all' is not installed; try: pip install not-there-at-all"),
        ("package:carrier_of_data/rows.csv", "the package 'carrier_of_data' has no file 'rows.csv'"),
        ("package:os/path", "'os' is not installed"),  # a module without a folder
        ("package:__main__/x", "is not installed"),
        ("package:", "expected package:NAME/path, got the package name ''"),
        ("package:carrier_of_data.inner/rows.csv", "got the package name 'carrier_of_data.inner'"),
    ],
)
def test_wrong_package_reference_says_what_is_wrong(package, reference, text):
    message = refused(resolve, reference)
    assert message.startswith(reference) and text in message


# files


def test_csv_json_and_parquet_files_give_the_same_rows(tmp_path):
    rows = {"text": ["café, au lait", 'say "x"', "z"], "label": ["no", "yes", "no"]}
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "a.CSV", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_parquet(tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert load(path)[:] == rows, path.name


def test_encoding_is_an_option_and_the_wrong_one_says_so(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ncafé,no\n".encode("latin-1"))
    assert texts(path, options={"encoding": "latin-1"}) == ["café"]
    message = refused(load, path)
    assert "tasks.t.data" in message and "'utf-8' codec" in message and "options: {encoding: latin-1}" in message
    assert "unknown encoding: latin-0" in refused(load, path, options={"encoding": "latin-0"})


def test_only_an_empty_csv_cell_is_missing(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("text,label\nNA,None\nnull,null\nb,\n")
    assert load(path)[:] == {"text": ["NA", "null", "b"], "label": ["None", "null", None]}
    assert load(path, options={"keep_default_na": True})["label"][:] == [None] * 3


def test_a_csv_file_with_a_field_more_than_its_header_is_not_shifted(tmp_path):
    path = tmp_path / "trailing.csv"
    path.write_text("text,label\na,no,\nb,yes,\n")  # as spreadsheets write it
    assert load(path)[:] == {"text": ["a", "b"], "label": ["no", "yes"]}
    path = tmp_path / "unquoted.csv"
    path.write_text("text,label\nwell, yes,1\nhm, no,0\n")
    with pytest.raises(UserError, match="A row has more fields than the header: quote texts"):
        tokenize(load(path), TASK, tiny_tokenizer(), 16)


def test_a_quotation_mark_does_not_swallow_the_rows_after_it(tmp_path):
    path = tmp_path / "glue.tsv"
    path.write_text('text\tlabel\n"a mark\tno\nb\tyes\nends" here\tno\n')
    said = refused(load, path)
    assert "spans several lines" in said and "{quoting: 3}" in said
    assert load(path, options={"quoting": 3})["text"][:] == ['"a mark', "b", 'ends" here']
    assert len(load(path, options={"quoting": 0})) == 1
    assert "spans several lines" in refused(load, path.rename(tmp_path / "glue.TSV"))


def test_csv_and_tsv_files_of_a_folder_are_read_as_one_alone(tmp_path):
    """By its own defaults `datasets` loses the class None there, and takes columns for their neighbours."""
    contents = {
        "none.csv": "text,label\nNA,None\nb,yes\n",
        "trailing.csv": "text,label\na,no,\nb,yes,\n",
        "tabs.tsv": "text\tlabel\nwell, no\tNA\nb\tyes\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        folder = tmp_path / f"{name} folder"
        folder.mkdir()
        (folder / f"train{Path(name).suffix}").write_text(content)
        assert load(folder)[:] == load(tmp_path / name)[:], name
    (folder / "train.tsv").write_text('text\tlabel\n"a mark\tno\nb\tyes\nends" here\tno\n')
    assert "{quoting: 3}" in refused(load, folder)
    assert load(folder, options={"quoting": 3})["text"][:] == ['"a mark', "b", 'ends" here']
    (tmp_path / "trailing.csv folder" / "train.csv").write_text("text,label\nwell, yes,1\nhm, no,0\n")
    assert "quote texts that hold the separator" in refused(load, tmp_path / "trailing.csv folder")


def test_a_file_is_found_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / "a [1] ü*?"
    folder.mkdir()
    (folder / "rows.csv").write_text("text,label\na,no\n")
    assert texts(folder / "rows.csv") == ["a"]


def test_a_file_read_with_another_separator_says_which_option_sets_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text;label\na;no\n")
    assert "expected one of: text;label; if the file has another separator, set options: {sep: " in refused(load, path)
    assert load(path, options={"sep": ";"})["text"][:] == ["a"]


def test_another_folder_is_not_taken_for_one_whose_name_is_a_pattern(tmp_path, monkeypatch):
    for name in ("v1", "v[1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(f"text,label\nof {name},no\n")
    (tmp_path / "link").symlink_to(tmp_path / "v[1]")
    for data, options in (("v[1]", {}), ("link", {}), (".", {"data_dir": "v[1]"})):
        assert "reads *, ? and [ in the path" in refused(load, tmp_path / data, options=options)
    monkeypatch.chdir(tmp_path / "v[1]")
    assert "reads *, ? and [ in the path" in refused(load, ".")
    assert texts("train.csv") == ["of v[1]"]
    monkeypatch.chdir(tmp_path / "v1")
    assert texts(".") == texts("train.csv") == ["of v1"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"no_such_option": 1}, "unexpected keyword argument 'no_such_option'"),
        ({"sep": 5}, "Check tasks.t.options: {'sep': 5}"),
        ({"split": "train"}, "tasks.t.options: 'split' cannot be set here; use train_split"),
        ({"streaming": True}, "tasks.t.options: 'streaming' cannot be set here"),
        ({"name": "rte"}, "tasks.t.options: 'name' cannot be set here; use subset"),
        ({"data_files": "b.csv"}, "tasks.t.options: 'data_files' cannot be set here"),
    ],
)
def test_wrong_option_is_a_user_error(tmp_path, options, text):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,no\n")
    assert text in refused(load, path, options=options)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", None, "tasks.t.data: there is no file"),
        ("empty.csv", "", "No columns to parse"),
        ("bad.json", "{nope", "JSON parse error"),
        ("bad.parquet", "nope", "Parquet"),
        ("a.txt", "hello", "tasks.t.data: expected a file of type .csv, .tsv, .json, .jsonl, .parquet, a folder"),
        ("none.csv", "text,label\n", "corresponds to no data"),
    ],
)
def test_file_that_is_missing_broken_empty_or_of_another_type_is_a_user_error(tmp_path, name, content, text):
    if content is not None:
        (tmp_path / name).write_text(content)
    message = refused(load, tmp_path / name)
    assert text in message and name in message


def test_subset_of_a_single_file_is_refused(numbered):
    assert refused(load, numbered, subset="rte") == "tasks.t.subset: must not be set with a single file, got 'rte'"


def test_missing_column_names_the_closest(numbered):
    wrong = TaskConfig(name="t", columns="texts", labels=("no", "yes"))
    assert refused(load, numbered, wrong) == "tasks.t: there is no column 'texts'; did you mean 'text'?"
    wrong = TaskConfig(name="t", columns="text", label_column="class", labels=("no", "yes"))
    assert refused(load, numbered, wrong) == "tasks.t: there is no column 'class'; expected one of: text, label"


def test_label_column_that_is_a_text_column_is_refused(numbered):
    wrong = TaskConfig(name="t", columns=("text", "label"), labels=("no", "yes"))
    assert "tasks.t.label_column: must differ from the columns of texts, got 'label'" in refused(load, numbered, wrong)


# splits


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("", range(20)),
        ("[:80%]", range(16)),
        ("[80%:]", range(16, 20)),
        ("[-10%:]", range(18, 20)),
        ("[5:7]", range(5, 7)),
        ("[-3:]", range(17, 20)),
        ("[:33%]", range(7)),  # 6.6 rows
        ("[10:99]", range(10, 20)),
    ],
)
def test_split_slices_are_rows_or_per_cent(numbered, part, rows):
    assert texts(numbered, train_split="train" + part) == [str(i) for i in rows]


def test_per_cent_slices_are_those_of_datasets(numbered):
    for part in ("[:4%]", "[3%:48%]", "[-27%:]", "[:-64%]", "[33%:66%]"):
        reference = datasets.load_dataset("json", data_files=str(numbered), split="train" + part)["text"]
        assert texts(numbered, train_split="train" + part) == reference[:], part


@pytest.mark.parametrize("part", ["[a:]", "[5]", "[:10%", "[:10%]+train[90%:]", "[::2]", "[:.5]"])
def test_wrong_slice_is_a_user_error(numbered, part):
    message = refused(load, numbered, train_split="train" + part)
    assert message == f"tasks.t.train_split: expected a split such as train[:80%], got 'train{part}'"


def test_missing_split_names_the_closest_and_the_way_out(numbered):
    message = refused(load, numbered, train_split="trian")
    assert message == "tasks.t.train_split: there is no split 'trian'; did you mean 'train'?"
    message = refused(load_task, TASK, DataConfig(data=str(numbered), validation_split="dev"))
    assert "tasks.t.validation_split: there is no split 'dev'; expected one of: train" in message
    assert "validation_fraction" in message


def test_validation_fraction_holds_out_a_seeded_disjoint_part(numbered):
    def parts(seed):
        split = load_task(TASK, DataConfig(data=str(numbered), validation_fraction=0.25), seed)
        return [rows["text"][:] for rows in split]

    train, validation = parts(0)
    assert len(validation) == 5 and sorted(train + validation) == sorted(str(i) for i in range(20))
    assert parts(0) == [train, validation]
    assert parts(1)[1] != validation


def test_validation_fraction_that_leaves_nothing_to_train_on_is_a_user_error(numbered):
    message = refused(load, numbered, train_split="train[:1]", validation_fraction=0.5)
    assert "tasks.t.validation_fraction: expected" in message and message.endswith("got 0.5 of 1")


def test_caps_take_a_seeded_sample_without_repeats(numbered):
    def capped(seed):
        parts = dict(train_split="train[:15]", validation_split="train[15:]")
        data = DataConfig(data=str(numbered), **parts, max_train_rows=8, max_validation_rows=99)
        return [rows["text"][:] for rows in load_task(TASK, data, seed)]

    train, validation = capped(0)
    assert len(set(train)) == 8 and train != [str(i) for i in range(8)]
    assert validation == [str(i) for i in range(15, 20)]
    assert capped(0)[0] == train and capped(1)[0] != train


@pytest.mark.parametrize("empty", [None, -1])
def test_a_cap_counts_examples_with_a_label(tmp_path, empty):
    rows = {"text": [str(i) for i in range(40)], "label": [i % 2 if i % 4 == 0 else empty for i in range(40)]}
    Dataset.from_dict(rows).to_json(tmp_path / "some.jsonl")
    capped = load(tmp_path / "some.jsonl", max_train_rows=6)
    everything = load(tmp_path / "some.jsonl").shuffle(seed=0)
    assert sum(label not in (None, -1) for label in capped["label"]) == 6
    assert capped["label"][-1] not in (None, -1) and capped[:] == everything[: len(capped)]
    data, left_out = tokenize(capped, TASK, tiny_tokenizer(), 16)
    assert (len(data), left_out) == (6, len(capped) - 6)
    assert len(load(tmp_path / "some.jsonl", max_train_rows=11)) == 40, "there are ten"


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "train"), ("train", "train[90%:]"), ("train[:50%]", "train[9:]"), ("train[-3:]", "train[17:18]")],
)
def test_rows_that_are_trained_on_are_not_validated_on(numbered, train, validation):
    data = DataConfig(data=str(numbered), train_split=train, validation_split=validation)
    message = refused(load_task, TASK, data)
    assert message.startswith(
        f"tasks.t.validation_split: {validation} shares rows with train_split {train}; slice both"
    )
    assert "validation_fraction" in message


@pytest.mark.parametrize(("train", "validation"), [("train[:90%]", "train[90%:]"), ("train[5:]", "train[:5]")])
def test_slices_that_share_no_row_make_two_splits(numbered, train, validation):
    data = DataConfig(data=str(numbered), train_split=train, validation_split=validation)
    ours, theirs = (rows["text"][:] for rows in load_task(TASK, data))
    assert sorted(ours + theirs, key=int) == [str(i) for i in range(20)]


def test_a_split_that_nobody_asks_for_need_not_be_there(tmp_path):
    for split, text in (("train", "a"), ("validation", "b")):
        Dataset.from_dict({"text": [text], "label": [0]}).to_json(tmp_path / f"{split}.jsonl")
    data = DataConfig(data=str(tmp_path))
    assert [rows["text"][:] for rows in load_task(TASK, data)] == [["a"], ["b"]]
    (tmp_path / "train.jsonl").unlink()
    (rows,) = load_task(TASK, data, splits=["validation"])
    assert rows["text"][:] == ["b"]
    assert "there is no split 'train'" in refused(load_task, TASK, data)


# folders


def test_folder_with_several_configs_asks_for_the_subset(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},no\n")
    configs = "".join(f"- config_name: {n}\n  data_files: [{{split: train, path: {n}.csv}}]\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert texts(tmp_path, subset="two") == ["two"]
    message = refused(load, tmp_path)
    assert "['one', 'two']" in message and "tasks.t.subset" in message
    assert "'tow' not found" in refused(load, tmp_path, subset="tow")


@needs_glue
def test_rte_of_a_glue_folder_has_its_official_rows_and_label_order():
    task = TaskConfig(name="rte", columns=("sentence1", "sentence2"), labels=("entailment", "not_entailment"))
    train, validation = load_task(task, DataConfig(data=str(GLUE), subset="rte"))
    assert len(train) == 2489 and len(validation) == 277
    assert set(train["label"]) == {0, 1}
    # 146 of the 277 pairs of RTE's dev set are entailments, the majority class.
    assert sum(label == 0 for label in validation["label"]) == 146
    row = next(r for r in validation if r["sentence1"].startswith("Dana Reeve, the widow"))
    assert "Christopher Reeve had an accident" in row["sentence2"] and row["label"] == 1

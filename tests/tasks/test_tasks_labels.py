"""From raw examples to model inputs: labels of every spelling, texts, words; every mistake is a short UserError."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_disparse.config import TaskConfig, UserError
from hf_disparse.tasks.data import tokenize
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer

MULTI, TOKENS = "multi_label_classification", "token_classification"
NAN = float("nan")


def task_of(labels=("no", "yes"), problem="single_label_classification", columns="text", label_column="label"):
    return TaskConfig(name="t", columns=columns, labels=labels, problem_type=problem, label_column=label_column)


def encode(values, labels=("no", "yes"), problem="single_label_classification", feature=None):
    """The `labels` of examples with these raw labels, and how many were left out."""
    words = [["w1"] * len(v) if isinstance(v, list) else ["w1"] for v in values]
    rows = {"text": words if problem == TOKENS else ["w1 w2"] * len(values), "label": values}
    text = List(Value("string")) if problem == TOKENS else Value("string")
    features = Features(text=text, label=feature) if feature is not None else None
    data, left_out = tokenize(
        Dataset.from_dict(rows, features=features), task_of(labels, problem), tiny_tokenizer(), 16
    )
    return data["labels"][:], left_out


def refused(call, *args, **kwargs) -> str:
    """The text of the UserError that the call raises, which has at most three short lines."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert str(caught.value).count("\n") <= 2 and len(str(caught.value)) < 400
    return str(caught.value)


# one class


@pytest.mark.parametrize(
    ("values", "labels", "ids"),
    [
        (["yes", "no"], ("no", "yes"), [1, 0]),
        ([1, 0], ("no", "yes"), [1, 0]),
        ([1.0, 0.0], ("no", "yes"), [1, 0]),
        ([True, False], ("no", "yes"), [1, 0]),
        # The name wins over the id where a column of names was read as numbers or bools.
        ([1, 3, 2], ("1", "2", "3"), [0, 2, 1]),
        ([0, 1], ("1", "0"), [1, 0]),
        ([-1, 1], ("-1", "1"), [0, 1]),
        ([-1.0, 0.0, 1.0], ("-1.0", "0.0", "1.0"), [0, 1, 2]),  # -1 is a class here, not the mark of none
        ([0.5, 2.0], ("0.5", "2"), [0, 1]),
        ([True, False], ("True", "False"), [0, 1]),
        ([True, False], ("true", "false"), [0, 1]),
        (["1", "0"], ("no", "yes"), [1, 0]),  # ids in a column of texts
        ([True, False], ("yes", "no"), [0, 1]),  # by name, for position would turn them round
        ([True, False], ("Positive", "Negative"), [0, 1]),
        ([True, False], ("one", "other"), [1, 0]),
        ([1.0, 1.5, 2.0], ("1.0", "1.5", "2.0"), [0, 1, 2]),
        ([1, 2, 10], ("01", "02", "10"), [0, 1, 2]),  # as pandas reads such names
    ],
)
def test_class_is_read_by_name_else_by_id(values, labels, ids):
    assert encode(values, labels) == (ids, 0)


@pytest.mark.parametrize(
    ("names", "labels", "ids"),
    [
        (["no", "yes"], ("no", "yes"), [0, 1]),
        (["yes", "no"], ("no", "yes"), [1, 0]),
        (["yes", "no", "maybe"], ("no", "yes"), [1, 0]),  # a class that no row has
        (["0", "1"], ("no", "yes"), [0, 1]),  # no name in common: the ids are all there is
        (["2", "1"], ("1", "2"), [1, 0]),
        (["Yes", "NO"], ("no", "yes"), [1, 0]),
        (["Yes", "yes"], ("yes", "no", "Yes"), [2, 0]),
    ],
)
def test_class_label_of_another_order_is_followed_by_name(names, labels, ids):
    assert encode([0, 1], labels, feature=ClassLabel(names=names)) == (ids, 0)


@pytest.mark.parametrize(
    ("values", "labels", "feature", "text"),
    [
        ([2], ("no", "yes"), None, "expected one of no, yes or an id in 0..1 in column 'label', got 2"),
        ([-2], ("no", "yes"), None, "got -2"),
        ([0.5], ("no", "yes"), None, "got 0.5"),
        (["Yes"], ("no", "yes"), None, "got 'Yes'"),
        ([""], ("no", "yes"), None, "got ''"),
        (["2"], ("no", "yes"), None, "got '2'"),
        ([[1]], ("no", "yes"), None, "got [1]"),
        ([5], ("1", "2"), None, "expected one of 1, 2 in column 'label', got 5"),
        ([0], ("1", "2"), None, "got 0"),  # no id of a class that is named by another number
        ([2], ("no", "yes"), ClassLabel(names=["yes", "no", "maybe"]), "got 'maybe'"),
        ([0], ("negative", "pos"), ClassLabel(names=["neg", "pos"]), "got 'neg'"),
        (["x" * 9000], tuple(f"class {i}" for i in range(900)), None, "class 11, ... or an id in 0..899"),
    ],
)
def test_label_outside_the_classes_is_a_user_error(values, labels, feature, text):
    message = refused(encode, values, labels, feature=feature)
    assert message.startswith("tasks.t: expected one of ") and text in message


@pytest.mark.parametrize(
    ("values", "problem", "labels", "kept"),
    [
        ([None, 1, -1, 0], "single_label_classification", ("no", "yes"), [1, 0]),
        ([NAN, 1.0, -1.0], "single_label_classification", ("no", "yes"), [1]),
        ([None, "yes"], "single_label_classification", ("no", "yes"), [1]),
        ([None, ["yes"], []], MULTI, ("no", "yes"), [[0, 1], [0, 0]]),  # an empty list says: none of them
        ([NAN, None, -1.0, 2.5], "regression", (), [-1.0, 2.5]),  # -1 is a number like others
        ([None, [1], []], TOKENS, ("no", "yes"), [[-100, 1, -100]]),
    ],
)
def test_unlabelled_examples_are_left_out_and_counted(values, problem, labels, kept):
    assert encode(values, labels, problem) == (kept, len(values) - len(kept))


def test_no_labelled_example_at_all_is_a_user_error():
    assert refused(encode, [-1, -1, None]) == "tasks.t: none of 3 examples has a label in 'label'"


# several classes, numbers


@pytest.mark.parametrize(
    ("values", "feature", "hot"),
    [
        ([["c", "a"], [], ["b", "b"]], None, [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        (["b"], None, [[0, 1, 0]]),
        ([[1, 0, 1], [0, 0, 0]], None, [[1, 0, 1], [0, 0, 0]]),
        ([[True, False, True]], None, [[1, 0, 1]]),
        ([[1.0, 0.0, 0.0]], None, [[1, 0, 0]]),
        # A list of ClassLabel holds ids, also where they look like zeros and ones.
        ([[0, 1, 1], [2]], List(ClassLabel(names=["a", "b", "c"])), [[1, 1, 0], [0, 0, 1]]),
        ([[0], [1, 2]], List(ClassLabel(names=["c", "a", "b"])), [[0, 0, 1], [1, 1, 0]]),
        ([[0], [1, 2]], List(ClassLabel(names=["0", "1", "2"])), [[1, 0, 0], [0, 1, 1]]),
    ],
)
def test_multi_label_is_read_from_names_zeros_and_ones_or_class_label_ids(values, feature, hot):
    assert encode(values, ("a", "b", "c"), MULTI, feature)[0] == hot


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["a", "d"], "expected a list with some of a, b, c, or 3 zeros and ones"),
        ([0, 1], "(CSV files cannot hold lists; use JSON lines) in column 'label', got [0, 1]"),
        ([0, 1, 2], "3 zeros and ones"),
        ([["a"], ["b"], ["c"]], "3 zeros and ones"),
        ([1.0, NAN, 0.0], "3 zeros and ones"),
        ("a,b", "got 'a,b'"),
        (-1, "got -1"),
    ],
)
def test_wrong_multi_label_is_a_user_error(value, text):
    assert text in refused(encode, [value], ("a", "b", "c"), MULTI)


def test_regression_takes_numbers_and_their_text():
    assert encode([1, -2.5, 0], (), "regression") == ([1.0, -2.5, 0.0], 0)
    assert encode(["3.25", "-1"], (), "regression") == ([3.25, -1.0], 0)


@pytest.mark.parametrize("value", ["three", "nan", float("inf"), [1.0], ""])
def test_regression_refuses_what_is_no_finite_number(value):
    message = refused(encode, [value], (), "regression")
    assert "number in column 'label', got " + repr(value) in message


# words


def wordpieces() -> PreTrainedTokenizerFast:
    """Splits `playing` into play, ##ing and `cats` into cat, ##s."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "cat", "##s", "the"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize(
    ("max_length", "ids", "labels"),
    [
        (16, [2, 8, 6, 7, 4, 5, 4, 3], [-100, 0, 1, -100, 2, -100, 2, -100]),
        (5, [2, 8, 6, 7, 3], [-100, 0, 1, -100, -100]),  # truncated behind a word
        (4, [2, 8, 6, 3], [-100, 0, 1, -100]),  # and within one
    ],
)
def test_label_of_a_word_stands_on_its_first_token_only(max_length, ids, labels):
    rows = Dataset.from_dict({"text": [["the", "cats", "playing", "play"]], "label": [["O", "B", "I", "I"]]})
    data, _ = tokenize(rows, task_of(("O", "B", "I"), TOKENS), wordpieces(), max_length)
    assert data["input_ids"][0] == ids and data["labels"][0] == labels


def test_word_labels_of_a_class_label_of_another_order_are_followed_by_name():
    feature = List(ClassLabel(names=["yes", "no"]))
    assert encode([[0, 1, 1]], ("no", "yes"), TOKENS, feature) == ([[-100, 1, 0, 0, -100]], 0)


@pytest.mark.parametrize(
    ("words", "labels", "text"),
    [
        (["w1", "w2"], [0], "expected a label per word in column 'label', got 1 for 2 words"),
        (["w1"], 0, "expected a label per word in column 'label', got 0"),
        (["w1", "w2"], "no", "expected a label per word in column 'label', got 'no'"),
        (["w1"], [None], "expected one of no, yes or an id in 0..1 in column 'label', got None"),
        ("w1 w2", [0, 1], "expected a list of words in column 'text', got 'w1 w2'"),
        (["w1", None], [0, 1], "expected a list of words in column 'text', got ['w1', None]"),
        (None, [0], "expected a list of words in column 'text', got None"),
    ],
)
def test_words_and_labels_that_do_not_fit_are_a_user_error(words, labels, text):
    rows = Dataset.from_dict({"text": [words], "label": [labels]})
    assert text in refused(tokenize, rows, task_of(problem=TOKENS), tiny_tokenizer(), 16)


# texts


def test_texts_and_pairs_are_tokenized_as_by_hand():
    index = {word: i for i, word in enumerate(VOCABULARY)}
    rows = Dataset.from_dict({"a": ["w1 w2", ""], "b": ["w3", "w4 other"], "label": [0, 1]})
    data, _ = tokenize(rows, task_of(columns=("a", "b")), tiny_tokenizer(), 16)
    assert data["input_ids"][:] == [[2, index["w1"], index["w2"], 3, index["w3"], 3], [2, 3, index["w4"], 1, 3]]
    assert data["attention_mask"][:] == [[1] * 6, [1] * 5]
    data, _ = tokenize(rows, task_of(columns="a"), tiny_tokenizer(), 16)
    assert data["input_ids"][:] == [[2, index["w1"], index["w2"], 3], [2, 3]]


def test_very_long_texts_are_truncated_at_the_end_of_the_longer_one():
    rows = Dataset.from_dict({"a": ["w1 " * 20_000], "b": ["w2 w3"], "label": [0]})
    data, _ = tokenize(rows, task_of(columns=("a", "b")), tiny_tokenizer(), 9)
    assert data["input_ids"][0] == [2, 5, 5, 5, 5, 3, 6, 7, 3]
    data, _ = tokenize(rows, task_of(columns="a"), tiny_tokenizer(), 9)
    assert data["input_ids"][0] == [2, *[5] * 7, 3]


@pytest.mark.parametrize("value", [None, 3, ["w1"]])
def test_text_that_is_no_string_is_a_user_error(value):
    rows = Dataset.from_dict({"text": [value], "label": [0]})
    message = refused(tokenize, rows, task_of(), tiny_tokenizer(), 16)
    assert f"tasks.t: expected text in column 'text', got {value!r}" in message


def test_columns_named_like_outputs_do_not_disturb_them():
    rows = Dataset.from_dict(
        {
            "input_ids": ["w1", "w2"],
            "labels": ["yes", "no"],
            "task": ["x", "y"],
            "attention_mask": [0.5, 0.5],
            "label": [0, 0],
        }
    )
    task = task_of(columns="input_ids", label_column="labels")
    data, _ = tokenize(rows, task, tiny_tokenizer(), 16)
    assert data[:] == {
        "input_ids": [[2, 5, 3], [2, 6, 3]],
        "attention_mask": [[1] * 3] * 2,
        "labels": [1, 0],
    }
    data, _ = tokenize(rows, task_of(columns="task", label_column="label"), tiny_tokenizer(), 16)
    assert data["labels"][:] == [0, 0] and data["input_ids"][:] == [[2, 1, 3]] * 2


@pytest.mark.parametrize(
    ("values", "feature", "labels", "ids"),
    [
        ([True, False, True], None, ("maybe", "no", "yes"), [2, 1, 2]),  # `datasets` would make truths of the ids
        ([1.0, 0.0, None], None, ("no", "yes"), [1, 0]),  # and floats, which a file with empty cells has
        ([0, 1, 1], ClassLabel(names=["b", "c"]), ("a", "b", "c"), [1, 2, 2]),
    ],
)
def test_a_label_column_called_labels_keeps_nothing_of_its_type(values, feature, labels, ids):
    features = Features({"text": Value("string"), "labels": feature}) if feature else None
    rows = Dataset.from_dict({"text": ["w1"] * 3, "labels": values}, features=features)
    data, _ = tokenize(rows, task_of(labels=labels, label_column="labels"), tiny_tokenizer(), 16)
    assert data["labels"][:] == ids and data.features["labels"] == Value("int64")


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_format_of_the_data_set_makes_no_difference(kind):
    rows = Dataset.from_dict({"text": ["w1", "w2", "w3"], "label": [1, -1, 0]})
    plain, formatted = (tokenize(r, task_of(), tiny_tokenizer(), 16) for r in (rows, rows.with_format(kind)))
    assert formatted[0][:] == plain[0][:] and formatted[1] == plain[1] == 1


def test_missing_column_and_hopeless_length_are_user_errors():
    rows = Dataset.from_dict({"text": ["w1"], "label": [0]})
    assert "there is no column 'txt'; did you mean 'text'?" in refused(
        tokenize, rows, task_of(columns="txt"), tiny_tokenizer(), 16
    )
    for length in (2, -1, True, 8.0):
        assert refused(tokenize, rows, task_of(), tiny_tokenizer(), length).startswith("max_length: expected a whole")


def test_a_truth_value_that_only_one_class_answers_is_refused():
    assert "expected one of positive, other, not a truth value in column 'label', got False" in refused(
        encode, [True, False], ("positive", "other")
    )


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_words_are_the_tokens_that_they_are_in_a_text(add_prefix_space):
    """A byte-level tokenizer writes the space before a word into its token, which a list of words does not have."""
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "the": 2, "Ġthe": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")
    rows = Dataset.from_dict({"text": [["the", "the"]], "label": [["no", "yes"]]})
    if add_prefix_space:
        assert tokenize(rows, task_of(problem=TOKENS), tokenizer, 16)[0]["input_ids"][:] == [[3, 3]]
    else:
        said = refused(tokenize, rows, task_of(problem=TOKENS), tokenizer, 16)
        assert said == "tokenizer: token_classification needs a tokenizer with add_prefix_space=True"

"""Batches of one task each, and the metrics of their predictions."""

import math
from collections import Counter
from itertools import pairwise

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_disparse.config import METRICS, TaskConfig, UserError
from hf_disparse.tasks.averages import average, average_name
from hf_disparse.tasks.batches import MultitaskCollator, TaskBatchSampler, TaskDataset
from hf_disparse.tasks.metrics import compute_metrics
from hf_disparse.tasks.task_metric import TaskMetric
from tests.helpers.tiny import tiny_tokenizer

SAMPLINGS = ("proportional", "temperature", "round_robin")


def owner(index, sizes):
    """The task of an index into a `TaskDataset`, and the row in it, by counting."""
    for task, size in sizes.items():
        if index < size:
            return task, index
        index -= size
    raise AssertionError(index)


def epoch_of(sizes, batch_size, epoch=0, **options):
    """The batches of an epoch as (task, rows), each checked to be full and of one task."""
    sampler = TaskBatchSampler(sizes, batch_size, **options)
    sampler.set_epoch(epoch)
    batches = []
    for batch in sampler:
        owners = [owner(i, sizes) for i in batch]
        assert len(batch) == batch_size and len({task for task, _ in owners}) == 1
        batches.append((owners[0][0], [row for _, row in owners]))
    assert len(batches) == len(sampler)
    return batches


# the data set


def test_item_is_a_row_of_its_task_with_the_task_added():
    data = TaskDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3, "task": "of the user"}]})
    assert list(data) == [{"x": 1, "task": "a"}, {"x": 2, "task": "a"}, {"x": 3, "task": "b"}]
    assert len(data) == 3 and data[-1] == data[2] and data[np.int64(-3)] == data[0]
    for index in (3, -4):
        with pytest.raises(IndexError):
            data[index]


def test_task_without_examples_is_a_user_error():
    with pytest.raises(UserError, match=r"^tasks\.b: expected at least one example, got none$"):
        TaskDataset({"a": [{}], "b": []})


# the sampler


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 60), min_size=1),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 3),
    sampling=st.sampled_from(SAMPLINGS),
    grouped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_epoch_has_full_batches_of_one_task_in_blocks_of_world_size(
    sizes, batch_size, world_size, sampling, grouped, seed
):
    lengths = {task: [7 * row % 11 for row in range(size)] for task, size in sizes.items()} if grouped else None
    batches = epoch_of(sizes, batch_size, world_size=world_size, sampling=sampling, lengths=lengths, seed=seed)
    assert len(batches) % world_size == 0
    for start in range(0, len(batches), world_size):
        assert len({task for task, _ in batches[start : start + world_size]}) == 1
    seen = {task: [row for t, rows in batches if t == task for row in rows] for task in sizes}
    for task, rows in seen.items():
        times = [Counter(rows)[row] for row in range(sizes[task])]
        if not grouped:  # by length, an epoch that stops within a task's examples has seen the shorter or longer ones
            assert max(times) - min(times) <= 1  # every example once before any comes again
    if sampling == "proportional":
        for task, size in sizes.items():
            blocks = math.ceil(size / (batch_size * world_size))
            assert set(seen[task]) == set(range(size)) and len(seen[task]) == blocks * batch_size * world_size


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_seed_and_epoch_fix_the_batches(sampling):
    def run(seed, epoch):
        return epoch_of({"a": 40, "b": 30}, 4, epoch, sampling=sampling, seed=seed)

    assert run(1, 2) == run(1, 2)
    runs = [str(run(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(runs)) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_examples_of_similar_length_meet_in_batches_that_come_in_random_order(world_size):
    lengths = torch.randint(5, 100, (3000,), generator=torch.Generator().manual_seed(0)).tolist()

    def longest(**options):
        batches = epoch_of({"a": 3000}, 8, epoch=1, world_size=world_size, **options)
        return np.array([max(lengths[row] for row in rows) for _, rows in batches])

    grouped = longest(lengths={"a": lengths})
    assert grouped.mean() < np.mean(lengths) + 2 < longest().mean() - 30
    assert abs(np.corrcoef(grouped[:-1], grouped[1:])[0, 1]) < (0.2 if world_size == 1 else 0.7)


def test_sampler_gives_the_same_epoch_twice_until_it_is_moved_on():
    sampler = TaskBatchSampler({"a": 9, "b": 7}, 2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_round_robin_takes_turns_and_small_tasks_start_over_in_a_fresh_order():
    batches = epoch_of({"a": 40, "b": 10, "c": 7}, 5, sampling="round_robin")
    assert [task for task, _ in batches] == ["a", "b", "c"] * 8
    rows = [row for task, batch in batches if task == "b" for row in batch]
    passes = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert all(one != other for one, other in pairwise(passes))
    assert sorted(row for task, batch in batches if task == "a" for row in batch) == list(range(40))


@pytest.mark.parametrize(
    ("temperature", "cap", "chance"),
    [
        (1.0, None, 4000 / 4500),
        (2.0, None, math.sqrt(4000) / (math.sqrt(4000) + math.sqrt(500))),
        (1.0, 1000, 1000 / 1500),
        (2.0, 1000, math.sqrt(1000) / (math.sqrt(1000) + math.sqrt(500))),
        (1e9, None, 0.5),
    ],
)
def test_temperature_draws_tasks_with_their_probability(temperature, cap, chance):
    batches = epoch_of({"big": 4000, "small": 500}, 2, sampling="temperature", temperature=temperature, cap=cap, seed=5)
    assert len(batches) == 2250
    drawn = sum(task == "big" for task, _ in batches)
    low, high = binom.interval(1 - 1e-4, len(batches), chance)
    assert low <= drawn <= high


def test_sampler_has_no_batch_size_for_accelerate_to_drop_blocks_by():
    assert not hasattr(TaskBatchSampler({"a": 3}, 2), "batch_size")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sampling": "round-robin"}, "task_sampling: unknown value 'round-robin'; did you mean 'round_robin'?"),
        ({"temperature": 0.5}, "sampling_temperature: expected a number of at least 1, got 0.5"),
        ({"temperature": float("nan")}, "sampling_temperature: expected a number of at least 1, got nan"),
        ({"cap": 0}, "sampling_cap: expected a whole number of at least 1, got 0"),
        ({"sizes": {"a": 3, "b": 0}}, "b: expected at least one, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least one, got 0"),
        ({"world_size": 0}, "world_size: expected at least one, got 0"),
    ],
)
def test_wrong_sampler_argument_is_a_user_error(arguments, text):
    with pytest.raises(UserError) as caught:
        TaskBatchSampler(**{"sizes": {"a": 3}, "batch_size": 2, **arguments})
    assert str(caught.value) == text


# the collator

TASKS = {
    "one": TaskConfig(name="one", columns="text", labels=("a", "b", "c")),
    "many": TaskConfig(name="many", columns="text", labels=("a", "b"), problem_type="multi_label_classification"),
    "real": TaskConfig(name="real", columns="text", problem_type="regression"),
    "words": TaskConfig(name="words", columns="text", labels=("O", "B"), problem_type="token_classification"),
}
INPUTS = [
    {"input_ids": [2, 5, 3], "attention_mask": [1] * 3},
    {"input_ids": [2, 6, 7, 8, 3], "attention_mask": [1] * 5},
]


def rows_of(task, labels):
    return [{**inputs, "labels": label, "task": task} for inputs, label in zip(INPUTS, labels, strict=True)]


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("one", [2, 0], torch.tensor([2, 0])),
        ("many", [[0, 1], [1, 1]], torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        ("real", [1, 2], torch.tensor([1.0, 2.0])),
        ("real", [0.5, -2], torch.tensor([0.5, -2.0])),
        ("words", [[-100, 1, -100], [-100, 0, 1, 0, -100]], [[-100, 1, -100, -100, -100], [-100, 0, 1, 0, -100]]),
    ],
)
def test_batch_is_padded_and_typed_for_the_loss(task, labels, expected):
    batch = MultitaskCollator(tiny_tokenizer(), TASKS)(rows_of(task, labels))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "task"} and batch["task"] == task
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 6, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    torch.testing.assert_close(batch["labels"], torch.as_tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("task", "labels", "collator"),
    [
        ("one", [2, 0], DataCollatorWithPadding),
        ("words", [[-100, 1, -100], [-100, 0, 1, 0, -100]], DataCollatorForTokenClassification),
    ],
)
def test_batch_is_that_of_the_collator_of_transformers(task, labels, collator):
    rows = rows_of(task, labels)
    batch = MultitaskCollator(tiny_tokenizer(), TASKS)(rows)
    reference = collator(tiny_tokenizer())([{k: v for k, v in row.items() if k != "task"} for row in rows])
    assert batch.pop("task") == task and set(batch) == set(reference)
    assert all(torch.equal(batch[key], reference[key]) for key in reference)


def test_batch_without_labels_is_padded_too():
    batch = MultitaskCollator(tiny_tokenizer(), TASKS)([{**inputs, "task": "one"} for inputs in INPUTS])
    assert set(batch) == {"input_ids", "attention_mask", "task"}


def test_collator_of_the_user_pads_in_place_of_the_others():
    def pad(rows):
        return {"labels": torch.tensor([row["labels"] for row in rows]), "seen": torch.tensor(len(rows[0]))}

    batch = MultitaskCollator(None, TASKS, pad=pad)(rows_of("real", [1, 2]))
    assert batch["seen"] == 3 and batch["labels"].dtype == torch.float32 and batch["task"] == "real"


# metrics


def one_hot(predictions, classes):
    return np.eye(classes)[predictions] * 3 - 1


def metrics_of(logits, labels, metric, names=("a", "b"), problem="single_label_classification"):
    task = TaskConfig(name="t", columns="text", labels=names, problem_type=problem, metric=metric)
    return compute_metrics(task, np.asarray(logits), np.asarray(labels))


def test_binary_metrics_are_those_of_the_confusion_matrix():
    # 4 true positives, 1 false positive, 2 false negatives, 3 true negatives, of class 1
    labels, predictions = [1] * 4 + [0] + [1] * 2 + [0] * 3, [1] * 5 + [0] * 5
    values = metrics_of(one_hot(predictions, 2), labels, ("accuracy", "f1", "matthews_correlation"))
    assert values["accuracy"] == pytest.approx(7 / 10)
    assert values["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert values["matthews_correlation"] == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))


def test_f1_over_three_classes_is_the_mean_of_the_classes():
    labels, predictions = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    values = metrics_of(one_hot(predictions, 3), labels, ("accuracy", "f1"), ("a", "b", "c"))
    assert values["f1"] == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)  # 2 tp / (2 tp + fp + fn)
    assert values["accuracy"] == pytest.approx(4 / 6)


def test_multi_label_f1_counts_all_decisions_and_accuracy_whole_examples():
    labels = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]]
    logits = [[2, -1, -1], [-1, 3, -2], [-1, -1, -1], [1, 1, 1]]  # tp 4, fp 1, fn 1
    values = metrics_of(logits, labels, ("f1", "accuracy"), ("a", "b", "c"), "multi_label_classification")
    assert values == {"f1": pytest.approx(8 / 10), "accuracy": pytest.approx(2 / 4)}


def test_f1_of_a_single_multi_label_class_is_not_its_accuracy():
    logits, labels = [[1.0], [-1.0], [-1.0], [-1.0]], [[1.0], [1.0], [0.0], [0.0]]
    values = metrics_of(logits, labels, ("f1", "accuracy"), ("a",), "multi_label_classification")
    assert values == {"f1": pytest.approx(2 / 3), "accuracy": pytest.approx(3 / 4)}


def test_token_metrics_leave_ignored_positions_out():
    labels = [[-100, 1, 0, -100], [-100, 1, 1, 0]]
    predictions = np.array([[1, 1, 1, 1], [0, 1, 0, 0]])  # of class 1: tp 2, fp 1, fn 1; tn 1
    values = metrics_of(one_hot(predictions, 2), labels, ("accuracy", "f1"), problem="token_classification")
    assert values == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(4 / 6)}


def test_correlations_are_covariance_over_deviations_of_values_and_of_ranks():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=50).astype(np.float32)
    logits = np.exp(labels) + generator.normal(size=50, scale=0.5).astype(np.float32)
    values = metrics_of(logits[:, None], labels, ("pearson", "spearmanr"), (), "regression")
    ranks = [np.argsort(np.argsort(x)) for x in (logits, labels)]
    assert values["pearson"] == pytest.approx(np.corrcoef(logits, labels)[0, 1], abs=1e-5)
    assert values["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@pytest.mark.parametrize("logits", [[1.0, 1.0, 1.0], [float("nan"), 1.0, 2.0]])
def test_correlation_with_a_constant_or_nan_is_zero(logits):
    values = metrics_of(logits, [1.0, 2.0, 3.0], ("pearson", "spearmanr"), (), "regression")
    assert values == {"pearson": 0.0, "spearmanr": 0.0}


def test_matthews_correlation_of_one_class_is_zero():
    assert metrics_of(one_hot([1, 1, 1], 2), [0, 1, 0], "matthews_correlation") == {"matthews_correlation": 0.0}


def test_what_the_average_leaves_out_is_in_its_name():
    assert average_name(["a", "wnli", "b"]) == "average without wnli"
    assert average_name(["WNLI"]) == average_name(["a", "b"]) == average_name(iter("ab")) == "average"


def test_average_is_that_of_the_tasks_and_leaves_wnli_out():
    values = {"mrpc": {"accuracy": 0.8, "f1": 0.9}, "cola": {"matthews_correlation": 0.5}, "WNLI": {"accuracy": 0.1}}
    assert average(values) == pytest.approx((0.85 + 0.5) / 2)
    assert average({"wnli": {"accuracy": 0.25}}) == 0.25


GENERATOR = np.random.default_rng(4)
MANY = {
    "single_label_classification": (GENERATOR.integers(0, 3, 200), GENERATOR.integers(0, 3, 200)),
    "multi_label_classification": (GENERATOR.integers(0, 2, (200, 3)), GENERATOR.integers(0, 2, (200, 3))),
    "token_classification": (GENERATOR.integers(0, 3, 200), GENERATOR.integers(0, 3, 200)),
    "regression": (GENERATOR.normal(size=200), GENERATOR.normal(size=200)),
}


@pytest.mark.parametrize("problem", MANY)
def test_evaluate_metric_is_scikit_learn_and_scipy_in_one_go_and_in_batches(problem):
    labels = () if problem == "regression" else ("a", "b", "c")
    task = TaskConfig(name="t", columns="text", labels=labels, problem_type=problem, metric=METRICS[problem])
    predictions, references = MANY[problem]
    average = "micro" if problem == "multi_label_classification" else "macro"
    independent = {
        "accuracy": lambda: sklearn.metrics.accuracy_score(references, predictions),
        "f1": lambda: sklearn.metrics.f1_score(references, predictions, average=average),
        "matthews_correlation": lambda: sklearn.metrics.matthews_corrcoef(references, predictions),
        "pearson": lambda: scipy.stats.pearsonr(predictions, references).statistic,
        "spearmanr": lambda: scipy.stats.spearmanr(predictions, references).statistic,
    }
    expected = {name: independent[name]() for name in METRICS[problem]}
    assert TaskMetric(task).compute(predictions=predictions, references=references) == expected
    metric = TaskMetric(task)
    for start in range(0, 200, 64):
        part = slice(start, start + 64)
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute() == expected


def test_evaluate_combines_our_metric_with_others():
    one = TaskConfig(name="t", columns="text", labels=("a", "b"), metric=("accuracy", "f1"))
    other = TaskConfig(name="t", columns="text", labels=("a", "b"), metric="matthews_correlation")
    labels, predictions = [1, 1, 0, 0], [1, 0, 0, 1]
    both = evaluate.combine([TaskMetric(one), TaskMetric(other)])
    values = both.compute(predictions=predictions, references=labels)
    assert values == {"accuracy": 0.5, "f1": 0.5, "matthews_correlation": 0.0}

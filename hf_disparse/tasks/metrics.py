"""GLUE's metrics and the like: an `evaluate.Metric` that needs no network, by scikit-learn and scipy."""

import math
from collections.abc import Iterable

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_disparse.config import TaskConfig


class TaskMetric(evaluate.Metric):
    """The metrics of a task as an `evaluate.Metric`: `compute`, `add_batch` and `evaluate.combine` work as they do there.

    Predictions and references are class ids (one per example, or per labelled word), floats for regression, and a 0 or 1
    per class for multi-label tasks. f1 is computed for class 1 of two, macro-averaged over more classes and micro-averaged
    for multi-label. A correlation with a constant is 0.

    Args:
        task: its `problem_type` says what a prediction is, its `metric` what to compute.
        kwargs: passed on to `evaluate.Metric`; by default examples are held in memory, not in files.
    """

    def __init__(self, task: TaskConfig, **kwargs):
        self.task = task
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.task.problem_type == "regression" else "int64")
        if self.task.problem_type == "multi_label_classification":
            kind = datasets.List(kind)
        return evaluate.MetricInfo(
            description=f"{', '.join(self.task.metric)} for {self.task.problem_type}, as fractions.",
            citation="",
            inputs_description="predictions and references, one per example",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return _values(self.task, np.asarray(predictions), np.asarray(references))


def compute_metrics(task: TaskConfig, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns metric -> value for a head's logits, as fractions rather than percentages, like the Trainer.

    Shapes: logits (examples, classes) and labels (examples,), for multi-label (examples, classes), for token
    classification (examples, tokens, classes) and (examples, tokens), where -100 is ignored.
    """
    if task.problem_type == "regression":
        predictions, labels = np.reshape(logits, -1), np.reshape(labels, -1)
    elif task.problem_type == "multi_label_classification":
        predictions, labels = (logits > 0).astype(int), labels.astype(int)
    else:
        predictions = logits.argmax(-1)
        if task.problem_type == "token_classification":
            predictions, labels = predictions[labels != -100], labels[labels != -100]
    return _values(task, predictions, labels)


def _values(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {metric: _METRICS[metric](task, predictions, labels) for metric in task.metric}


def _f1(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> float:
    averaging = "binary" if task.num_labels == 2 else "macro"
    if task.problem_type == "multi_label_classification":
        # scikit-learn reads a single column as classes 0 and 1, and their micro average would be the accuracy.
        averaging = "binary" if task.num_labels == 1 else "micro"
    return float(f1_score(labels, predictions, average=averaging, zero_division=0))


def _matthews(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(np.union1d(predictions, labels)) < 2:  # a single class: 0 as in scikit-learn, but without its warning
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _correlation(function, predictions: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    value = float(function(predictions, labels)[0])
    return 0.0 if math.isnan(value) else value


_METRICS = {
    "accuracy": lambda task, predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": lambda task, predictions, labels: _correlation(pearsonr, predictions, labels),
    "spearmanr": lambda task, predictions, labels: _correlation(spearmanr, predictions, labels),
}


def average(values: dict[str, dict[str, float]]) -> float:
    """Returns the mean over tasks of the mean of each task's metrics; GLUE excludes WNLI if there are other tasks.

    Args:
        values: task -> metric -> value.
    """
    return float(np.mean([np.mean(list(values[task].values())) for task in counted_tasks(values)]))


def average_name(tasks: Iterable[str]) -> str:
    """Returns the name of the average over these tasks, which says if a task is excluded."""
    left_out = set(tasks := list(tasks)) - set(counted_tasks(tasks))
    return "average" + (f" without {', '.join(sorted(left_out))}" if left_out else "")


def counted_tasks(tasks: Iterable[str]) -> list[str]:
    """Returns the tasks that count in the average: GLUE excludes WNLI if there are others."""
    return [task for task in tasks if task.lower() != "wnli"] or list(tasks)

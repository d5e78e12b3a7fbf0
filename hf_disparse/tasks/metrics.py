"""GLUE's metrics and the like, computed by scikit-learn and scipy, which load when a metric is first computed."""

import math

import numpy as np

from hf_disparse.config import TaskConfig


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
    return metric_values(task, predictions, labels)


def metric_values(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of predictions: metric -> value. Shapes: predictions and labels alike."""
    return {metric: _METRICS[metric](task, predictions, labels) for metric in task.metric}


def _accuracy(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    averaging = "binary" if task.num_labels == 2 else "macro"
    if task.problem_type == "multi_label_classification":
        # scikit-learn reads a single column as classes 0 and 1, and their micro average would be the accuracy.
        averaging = "binary" if task.num_labels == 1 else "micro"
    return float(f1_score(labels, predictions, average=averaging, zero_division=0))


def _matthews(task: TaskConfig, predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(np.union1d(predictions, labels)) < 2:  # a single class: 0 as in scikit-learn, but without its warning
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy import stats

    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    value = float(getattr(stats, name)(predictions, labels)[0])
    return 0.0 if math.isnan(value) else value


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": lambda task, predictions, labels: _correlation("pearsonr", predictions, labels),
    "spearmanr": lambda task, predictions, labels: _correlation("spearmanr", predictions, labels),
}

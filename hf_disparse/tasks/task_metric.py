"""A task's metrics as an `evaluate.Metric`, for those who use that library."""

import datasets
import evaluate
import numpy as np

from hf_disparse.config import TaskConfig
from hf_disparse.tasks.metrics import metric_values


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
        return metric_values(self.task, np.asarray(predictions), np.asarray(references))

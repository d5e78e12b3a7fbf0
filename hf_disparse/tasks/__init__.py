"""Tasks: their data, batches and metrics."""

from hf_disparse.files import resolve
from hf_disparse.tasks.batches import MultitaskCollator, TaskBatchSampler, TaskDataset
from hf_disparse.tasks.data import load_task, tokenize
from hf_disparse.tasks.metrics import TaskMetric, average, average_name, compute_metrics, counted_tasks

__all__ = [
    "MultitaskCollator",
    "TaskBatchSampler",
    "TaskDataset",
    "TaskMetric",
    "average",
    "average_name",
    "compute_metrics",
    "counted_tasks",
    "load_task",
    "resolve",
    "tokenize",
]

"""The average over tasks, as GLUE takes it."""

from collections.abc import Iterable

import numpy as np


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

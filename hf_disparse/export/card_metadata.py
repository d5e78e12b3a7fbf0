"""The metadata of a model card, as the Hub reads it: base model, tags, data sets and metrics."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_disparse.config import TaskConfig

_METRICS = {"f1": "F1", "pearson": "Pearson", "spearmanr": "Spearman", "matthews_correlation": "Matthews correlation"}


def metadata_of(
    name: str, tasks: Mapping[str, TaskConfig], results: Mapping[str, Any], license: str | None = None
) -> ModelCardData:
    """The metadata of the model `name`; what `results` (the contents of results.json) does not say is left out."""
    recipe = results.get("recipe", {})
    base, data = recipe.get("encoder", ""), recipe.get("data", {})
    is_hub_id = base.count("/") == 1 and ":" not in base
    on_the_hub = {data[task]["data"] for task in tasks if data.get(task, {}).get("data", "").count("/") == 1}
    return ModelCardData(
        model_name=name,
        license=license,
        base_model=base if is_hub_id else None,
        base_model_relation="quantized" if is_hub_id else None,  # the Hub's closest word
        library_name="transformers",
        pipeline_tag=min(pipeline_tag(task) for task in tasks.values()),
        tags=["hf_disparse", "pruning", "sparse", *(["multi-task"] if len(tasks) > 1 else [])],
        datasets=sorted(on_the_hub) or None,
        eval_results=_eval_results(tasks, results) or None,
    )


def pipeline_tag(task: TaskConfig) -> str:
    """The Hub's name of a kind of task."""
    return "token-classification" if task.problem_type == "token_classification" else "text-classification"


def _eval_results(tasks: Mapping[str, TaskConfig], results: Mapping[str, Any]) -> list[EvalResult]:
    """One result per task and metric of the sparse model."""
    data, found = results.get("recipe", {}).get("data", {}), []
    for task, metrics in results.get("sparse", {}).get("tasks", {}).items():
        entry = data.get(task, {})
        for metric, value in metrics.items():
            found.append(
                EvalResult(
                    task_type=pipeline_tag(tasks[task]) if task in tasks else "text-classification",
                    dataset_type=entry.get("data", task),
                    dataset_name=task,
                    dataset_config=entry.get("subset"),
                    dataset_split=entry.get("split"),
                    metric_type=metric,
                    metric_name=_METRICS.get(metric, metric.capitalize()),
                    metric_value=round(value, 2),
                )
            )
    return found

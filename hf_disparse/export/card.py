"""The model card: what a model is, what it costs and how to use it, all read from the model's folder."""

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_disparse.config import PRUNING_CONFIG_NAME, PruningConfig, TaskConfig
from hf_disparse.config.version import __version__
from hf_disparse.export.card_metadata import metadata_of
from hf_disparse.export.card_usage import usage, usage_alone
from hf_disparse.export.measurements import TOKENS, measure_speed, size
from hf_disparse.export.results import read_results, using_results
from hf_disparse.model.loading import load_as_saved
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.pruning.granularity import granularity_of
from hf_disparse.report.sentences import speed_sentence
from hf_disparse.report.values import SPEED_HEADER, speed_cells
from hf_disparse.tasks.averages import average, average_name

CARD_NAME = "README.md"
_LOG_ROWS = 12


def write_card(
    folder: str | Path, name: str | None = None, license: str | None = None, results: Mapping[str, Any] | None = None
) -> ModelCard:
    """Writes README.md into a folder that holds a `MultitaskModel` in any form; loads and times the model to do so.

    Args:
        name: the Hub id that the usage snippet loads; default: the folder's name.
        license: as the Hub spells it, such as `apache-2.0`; the base model's licence also binds the sparse model.
        results: used instead of the folder's `results.json`, in full or in part. Its `speed` has to be that of this model, which is
            measured otherwise.

    Raises:
        UserError: the model does not load, or `results.json` is not what training writes.
    """
    folder = Path(folder)
    speed = (results or {}).get("speed")
    if results is None:  # its `speed` may be that of the model before it was exported
        results = read_results(folder)
    pruning = PruningConfig.from_pretrained(folder) if (folder / PRUNING_CONFIG_NAME).is_file() else None
    model = load_as_saved(folder).eval()
    name = name or folder.resolve().name
    sizes = size(folder, model, pruning)
    with using_results(folder):
        tokens = results.get("speed", {}).get("tokens", TOKENS)
    speed = speed or measure_speed(model, tokens)
    with using_results(folder):
        sections = [
            _summary(name, model, results, pruning),
            usage(name, model),
            _metrics(results),
            _costs(name, sizes, speed),
            _training(results, pruning),
            _limits(results),
            _versions(results),
        ]
        metadata = metadata_of(name, model.tasks, results, license)
    return _save(folder, metadata, sections)


def write_task_card(
    folder: Path, task: TaskConfig, model: PreTrainedModel, name: str, subfolder: str | None, source: Path | None
) -> None:
    """Writes README.md beside the plain `model` of one task.

    Args:
        name, subfolder: what the usage snippet loads.
        source: the folder of the multitask model, whose `results.json` has the metrics.
    """
    results = read_results(source or folder)
    weights = [p for p in model.base_model.parameters() if p.ndim == 2]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    with using_results(source or folder):
        for phase in ("dense", "sparse"):
            if phase in results:
                mine = {key: metrics for key, metrics in results[phase]["tasks"].items() if key == task.name}
                results[phase] = {"tasks": mine, "average": average(mine)} if mine else {}
        results = {key: value for key, value in results.items() if value}
        sections = [
            f"# {task.name}\n\nThe task `{task.name}` of a multitask model with one shared encoder, as a plain "
            f"`{type(model).__name__}`: {100 * zeros:.1f} % of the entries of its encoder's matrices, embeddings included, are "
            "zero.",
            usage_alone(task, type(model).__name__, name, subfolder),
            _metrics(results),
            _limits(results),
            _versions(results),
        ]
        metadata = metadata_of(task.name, {task.name: task}, results)
    _save(folder, metadata, sections)


def _save(folder: Path, metadata: ModelCardData, sections: Iterable[str]) -> ModelCard:
    """Writes the card; empty sections are left out."""
    text = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")
    card.save(folder / CARD_NAME)
    return card


def _summary(name: str, model: MultitaskModel, results: Mapping[str, Any], pruning: PruningConfig | None) -> str:
    """The title and what the model is: encoder, tasks, how it was pruned, adapters."""
    tasks, base = ", ".join(model.tasks), results.get("recipe", {}).get("encoder") or model.encoder.config.model_type
    how = ""
    if pruning and pruning.sparsity:
        what = granularity_of(pruning).describe()
        chosen = pruning.chosen_by()
        how = f"{100 * pruning.sparsity:g} % of the {what} of its layers are pruned, {chosen}."
        if stopped := results.get("guard", {}).get("stopped"):
            undone, kept = (f"{100 * stopped[key]:.1f} %" for key in ("undone", "kept"))
            how = (
                f"{kept} of the prunable weights are pruned, {chosen}. The target was {100 * pruning.sparsity:g} % of the "
                f"{what}, but at {undone} the task {stopped['task']} lost {stopped['drop']:.1f} points, more than allowed."
            )
        if pruning.reconstruct:
            how += " The remaining weights were then refitted by least squares to match the dense matrices' outputs."
    apart = [f"{task} ({config.peft_type.value})" for task, config in model.adapters.items()]
    if apart:
        how += f" These tasks have their own PEFT adapters on the frozen encoder: {', '.join(apart)}."
    return f"# {name}\n\nOne shared encoder ({base}) with one head for each of these tasks: {tasks}. {how.strip()}".rstrip()


def _metrics(results: Mapping[str, Any]) -> str:
    """A table of the sparse model's metrics, beside the dense model's if there are any."""
    if "sparse" not in results:
        return ""
    data, examples = results.get("recipe", {}).get("data", {}), results.get("examples", {}).get("validation", {})
    before = results.get("dense")

    def numbers(dense: float | None, sparse: float) -> tuple[str, ...]:
        return (f"{sparse:.1f}",) if dense is None else (f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}")

    rows = [("task", "data", "examples", "metric", *(("dense", "sparse", "difference") if before else ("value",)))]
    for task, metrics in results["sparse"]["tasks"].items():
        entry = data.get(task, {})
        source = " ".join(str(entry[key]) for key in ("data", "subset", "split") if entry.get(key))
        for metric, sparse in metrics.items():
            dense = before["tasks"][task][metric] if before else None
            rows.append((task, source, str(examples.get(task, "")), metric, *numbers(dense, sparse)))
    if len(results["sparse"]["tasks"]) > 1:
        averages = numbers(before["average"] if before else None, results["sparse"]["average"])
        rows.append((average_name(results["sparse"]["tasks"]), "", "", "", *averages))
    further = "; the sparse model was trained further." if "log" in results else "; nothing was trained after pruning."
    note = f' "Dense" is the same model before pruning{further}' if before else ""
    return f"## Metrics\n\nMeasured on validation data, from 0 to 100.{note}\n\n{_table(rows)}"


def _costs(name: str, sizes: list[tuple[str, str]], speed: Mapping[str, Any]) -> str:
    """The tables of size and of speed."""
    times = _table([("", *SPEED_HEADER[1:]), *speed_cells(speed)])
    return f"## Size and speed\n\n{_table([('', ''), *sizes])}\n\n{times}\n\n{speed_sentence(speed, name)}"


def _training(results: Mapping[str, Any], pruning: PruningConfig | None) -> str:
    """The settings of each phase and some rows of the training log."""
    recipe, parts = results.get("recipe", {}), []
    for title, values in (("pruning", pruning.to_dict() if pruning else {}), *recipe.get("arguments", {}).items()):
        if values:
            shown = "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None)
            parts.append(f"`{title}`:\n\n```yaml\n{shown}\n```")
    log = results.get("log", [])
    if log:
        some = log[:: max(1, -(-len(log) // _LOG_ROWS))]
        rows = [("phase", "step", "loss", "sparsity")]
        rows += [(x["phase"], str(x["step"]), f"{x['loss']:.3f}", f"{100 * x['sparsity']:.1f} %") for x in some]
        parts.append(_table(rows))
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _limits(results: Mapping[str, Any]) -> str:
    """What a user should not expect of the model."""
    seeds = "- The metrics come from one seed, on data like the training data; on small tasks other seeds differ by a point or more.\n"
    return (
        f"## Limits\n\n{seeds if 'sparse' in results else ''}"
        "- Zeros save time on a CPU after `hf_disparse.speed_up(model)`; otherwise PyTorch multiplies by them as by other numbers.\n"
        "- Licence, languages and biases are those of the base model and its training data; pruning may have hurt rare cases "
        "more than the averages show."
    )


def _versions(results: Mapping[str, Any]) -> str:
    """The versions of the libraries that the model was trained with, else those that wrote the card."""
    versions = results.get("environment") or {
        "hf_disparse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table, the first one as its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

"""The model card: what a model is, what it costs, and how to use it, from what its folder says. Layer 7."""

import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from hf_disparse.config import PRUNING_CONFIG_NAME, PruningConfig, TaskConfig, UserError, one_line
from hf_disparse.config.version import __version__
from hf_disparse.files import read_json
from hf_disparse.model.architectures import token_limit
from hf_disparse.model.loading import CONFIG_NAME, load, weight_files
from hf_disparse.model.multitask import MultitaskConfig, MultitaskModel
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.sparsity import sparsity_report
from hf_disparse.tasks import average, average_name

CARD_NAME, RESULTS_NAME = "README.md", "results.json"
_TOKENS, _ROUNDS, _LOG_ROWS = 64, 7, 12
_METRICS = {"f1": "F1", "pearson": "Pearson", "spearmanr": "Spearman", "matthews_correlation": "Matthews correlation"}


def write_card(
    folder: str | Path, name: str | None = None, license: str | None = None, results: Mapping[str, Any] | None = None
) -> ModelCard:
    """Writes README.md into a folder that holds a `MultitaskModel` in any form; the model is loaded and timed for that.

    Args:
        name: the Hub id that the usage snippet loads; default: the folder's name.
        license: as the Hub spells it, such as `apache-2.0`; a sparse model is bound by that of its base model.
        results: what `results.json` would hold, or some of it, where there is none.
    """
    folder = Path(folder)
    if results is None:
        results = read_json(folder / RESULTS_NAME) if (folder / RESULTS_NAME).is_file() else {}
    pruning = PruningConfig.from_pretrained(folder) if (folder / PRUNING_CONFIG_NAME).is_file() else None
    model = load(folder).eval()
    name = name or folder.resolve().name
    usage, size = _usage(name, model), _size(folder, model, pruning)
    with _reading(folder / RESULTS_NAME):
        sections = [
            _summary(name, model, results, pruning),
            usage,
            _metrics(results),
            size,
            _training(results, pruning),
            _limits(results),
            _versions(results),
        ]
        metadata = _metadata(name, model.tasks, results, license)
    return _save(folder, metadata, sections)


def write_task_card(
    folder: Path, task: TaskConfig, model: PreTrainedModel, name: str, subfolder: str | None, source: Path | None
) -> None:
    """Writes README.md beside the plain `model` of one task.

    Args:
        name, subfolder: of what the usage snippet loads.
        source: the folder of the multitask model, whose `results.json` has the metrics.
    """
    path = Path(source or folder, RESULTS_NAME)
    results = read_json(path) if path.is_file() else {}
    weights = [p for p in model.base_model.parameters() if p.ndim == 2]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    with _reading(path):
        for phase in ("dense", "sparse"):
            if phase in results:
                mine = {name: metrics for name, metrics in results[phase]["tasks"].items() if name == task.name}
                results[phase] = {"tasks": mine, "average": average(mine)} if mine else {}
        results = {key: value for key, value in results.items() if value}
        sections = [
            f"# {task.name}\n\nThe task `{task.name}` of a multitask model with one shared encoder, as a plain "
            f"`{type(model).__name__}`: {100 * zeros:.1f} % of its encoder's matrices, embeddings included, are zeros.",
            _usage_alone(task, type(model).__name__, name, subfolder),
            _metrics(results),
            _limits(results),
            _versions(results),
        ]
        metadata = _metadata(task.name, {task.name: task}, results)
    _save(folder, metadata, sections)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one line what is wrong with the results.json of another program."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"one that does not fit: {one_line(error)}"
        raise UserError(f"{path}: expected what `hf-disparse train` writes, got {got}") from error


def _save(folder: Path, metadata: ModelCardData, sections: Iterable[str]) -> ModelCard:
    text = "\n\n".join(section for section in sections if section)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")
    card.save(folder / CARD_NAME)
    return card


def losses_of_log(history: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The training losses in a Trainer's `state.log_history`, with the sparsity that they were at."""
    rows = (row for row in history if "loss" in row)
    return [{"step": row["step"], "loss": row["loss"], "sparsity": row.get("sparsity", 0.0)} for row in rows]


def results_of_log(history: list[Mapping[str, Any]], tasks: Mapping[str, TaskConfig]) -> dict[str, Any]:
    """What of `results.json` a Trainer's `state.log_history` says: the last evaluation and the losses."""
    results = {"log": [{"phase": "training", **row} for row in losses_of_log(history)]}
    last = next((row for row in reversed(history) if "eval_average" in row), None)
    if last:
        values = {
            name: {m: 100 * last[f"eval_{name}_{m}"] for m in task.metric if f"eval_{name}_{m}" in last}
            for name, task in tasks.items()
        }
        shown = {name: metrics for name, metrics in values.items() if metrics}
        results["sparse"] = {"tasks": shown, "average": 100 * last["eval_average"]}
    return results


def is_multitask(folder: str | Path) -> bool:
    """Whether a folder holds what `write_card` describes."""
    return read_json(Path(folder, CONFIG_NAME)).get("model_type") == MultitaskConfig.model_type


def tokens_to_time(config: PreTrainedConfig) -> int:
    """The length of a text whose time is told: 64, or what the encoder has positions for."""
    return min(_TOKENS, token_limit(config) or _TOKENS)


def latency(model: MultitaskModel, tokens: int) -> dict[int, float]:
    """batch size -> milliseconds of one pass of the encoder and the first head, median."""
    task, milliseconds = next(iter(model.tasks)), {}
    for size in (1, 32):
        ids = torch.full((size, tokens), 5, device=model.device)
        seconds = []
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), task=task).logits.cpu()
            seconds.append(time.perf_counter() - start)
        milliseconds[size] = 1000 * statistics.median(seconds[1:])  # the first one warms up
    return milliseconds


def _kind(task: TaskConfig) -> str:
    return "token-classification" if task.problem_type == "token_classification" else "text-classification"


def _metadata(
    name: str, tasks: Mapping[str, TaskConfig], results: Mapping[str, Any], license: str | None = None
) -> ModelCardData:
    base = results.get("recipe", {}).get("encoder", "")
    is_hub_id = base.count("/") == 1 and ":" not in base
    kinds = sorted({_kind(task) for task in tasks.values()})
    data = results.get("recipe", {}).get("data", {})
    return ModelCardData(
        model_name=name,
        license=license,
        base_model=base if is_hub_id else None,
        base_model_relation="quantized" if is_hub_id else None,  # the Hub's closest word
        library_name="transformers",
        pipeline_tag=kinds[0],
        tags=["hf_disparse", "pruning", "sparse", *(["multi-task"] if len(tasks) > 1 else [])],
        datasets=sorted({data[task]["data"] for task in tasks if data.get(task, {}).get("data", "").count("/") == 1})
        or None,
        eval_results=_eval_results(tasks, results),
    )


def _eval_results(tasks: Mapping[str, TaskConfig], results: Mapping[str, Any]) -> list[EvalResult] | None:
    data, found = results.get("recipe", {}).get("data", {}), []
    for task, metrics in results.get("sparse", {}).get("tasks", {}).items():
        entry = data.get(task, {})
        kind = _kind(tasks[task]) if task in tasks else "text-classification"
        for metric, value in metrics.items():
            found.append(
                EvalResult(
                    task_type=kind,
                    dataset_type=entry.get("data", task),
                    dataset_name=task,
                    dataset_config=entry.get("subset"),
                    dataset_split=entry.get("split"),
                    metric_type=metric,
                    metric_name=_METRICS.get(metric, metric.capitalize()),
                    metric_value=round(value, 2),
                )
            )
    return found or None


def _summary(name: str, model: MultitaskModel, results: Mapping[str, Any], pruning: PruningConfig | None) -> str:
    tasks, base = ", ".join(model.tasks), results.get("recipe", {}).get("encoder") or model.encoder.config.model_type
    how = ""
    if pruning and pruning.sparsity:
        what = _pruned_things(pruning)
        judged = _judged(pruning)
        how = f"{100 * pruning.sparsity:g} % of the {what} of its layers are pruned, {judged}."
        if stopped := results.get("guard", {}).get("stopped"):
            undone, kept = (f"{100 * stopped[key]:.1f} %" for key in ("undone", "kept"))
            how = (
                f"{kept} of the prunable weights are pruned, {judged}. {100 * pruning.sparsity:g} % of the {what} were asked "
                f"for, but at {undone} the task {stopped['task']} lost {stopped['drop']:.1f} points, more than it may."
            )
        if pruning.reconstruct:
            how += " What was left was then fitted to what the whole matrices did, by least squares."
    apart = [f"{task} ({config.peft_type.value})" for task, config in model.adapters.items()]
    if apart:
        how += f" On the encoder, which is frozen, these tasks have PEFT adapters of their own: {', '.join(apart)}."
    return (
        f"# {name}\n\nOne shared encoder ({base}) with a head for each of these tasks: {tasks}. {how.strip()}".rstrip()
    )


def _judged(pruning: PruningConfig) -> str:
    """By what the pruned things were chosen, as the end of a sentence."""
    rule = {
        "unanimous": "what all tasks can spare",
        "quorum": f"what fewer than {pruning.quorum} tasks want",
        "joint": "the summed loss of all tasks",
        "mean_rank": "the mean rank over the tasks",
    }.get(pruning.decision, f"the {pruning.decision} of the tasks' scores")
    if pruning.method == "dynamic":
        grown = {"unanimous": "any task wants", "joint": "the summed loss wants"}
        wanted = grown.get(pruning.decision, f"at least {pruning.quorum} tasks want")
        dropped = "magnitude" if pruning.drop == "magnitude" else rule
        return f"in dynamic sparse training: dropped by {dropped}, grown where {wanted} it most"
    of_method = {
        "group_lasso": "those of the smallest norms after training with a penalty on them (group lasso)",
        "l0": "by the hard-concrete gates that all tasks trained together (L0)",
        "flop": "by the hard-concrete gates that all tasks trained together (FLOP)",
        "movement": f"by movement pruning: {rule}",
        "platon": f"by PLATON's sensitivity: {rule}",
    }
    if pruning.method in of_method:
        return of_method[pruning.method]
    if pruning.criterion == "agreement":
        return "by the agreement of the tasks' gradients on them"
    if pruning.criterion in ("magnitude", "random"):
        return f"by the criterion `{pruning.criterion}`, which is the same for all tasks"
    if pruning.decision == "joint":
        return f"by the criterion `{pruning.criterion}` of {rule}"
    return f"by {rule}, each task judging by the criterion `{pruning.criterion}`"


def _pruned_things(pruning: PruningConfig) -> str:
    if pruning.n_of_m:
        n, m = pruning.n_of_m
        return f"weights ({m - n} of every {m} along each row: the pattern {n}:{m})"
    if pruning.block:
        return "{} x {} blocks".format(*pruning.block)
    if pruning.granularity == ("rank",):
        return "parameters of the matrices (each the product of two, whose rank is cut)"
    return " and ".join({"channel": "input channels"}.get(kind, f"{kind}s") for kind in pruning.granularity)


def _usage(name: str, model: MultitaskModel) -> str:
    pair = all(len(task.columns) == 2 for task in model.tasks.values())
    example = '("A first text.", "A second text.")' if pair else '"A text."'
    return (
        "## Use\n\n```bash\npip install hf_disparse\n```\n\n```python\nfrom hf_disparse import MultitaskPipeline\n\n"
        f'pipeline = MultitaskPipeline.from_pretrained("{name}")\n'
        f"print(pipeline({example}))  # the answers of the tasks that take {'two texts' if pair else 'one text'}\n```\n\n"
        "After `import hf_disparse`, `AutoModel.from_pretrained` loads it too, to train on or to use with `task=`."
    )


def _usage_alone(task: TaskConfig, class_name: str, name: str, subfolder: str | None) -> str:
    """The snippet of a plain model; transformers' pipeline takes no subfolder."""
    text = "{'text': 'A first text.', 'text_pair': 'A second text.'}" if len(task.columns) == 2 else "'A text.'"
    if subfolder is None:
        code = f'from transformers import pipeline\n\nprint(pipeline("{_kind(task)}", "{name}")({text}))'
    else:
        code = (
            f"from transformers import AutoTokenizer, {class_name}, pipeline\n\n"
            f'where = {{"pretrained_model_name_or_path": "{name}", "subfolder": "{subfolder}"}}\n'
            f"model, tokenizer = {class_name}.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)\n"
            f'print(pipeline("{_kind(task)}", model, tokenizer=tokenizer)({text}))'
        )
    return f"## Use\n\n```python\n{code}\n```"


def _metrics(results: Mapping[str, Any]) -> str:
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
    said = ' "Dense" is the same model before it was pruned; the sparse one was trained on.' if before else ""
    return f"## Metrics\n\nOn validation data, 0 to 100.{said}\n\n{_table(rows)}"


def _size(folder: Path, model: MultitaskModel, pruning: PruningConfig | None) -> str:
    form = read_json(folder / CONFIG_NAME).get("quantization_config") or {}
    parameters, tokens = sum(p.numel() for p in model.parameters()), tokens_to_time(model.encoder.config)
    times = latency(model, tokens)
    for task in list(model.adapters):
        model.delete_adapter(task)
    zeros = sparsity_report(model, model.encoder, prunable_parameters(model, pruning))
    forms = {
        "packed": "packed: non-zeros and a bit a weight",
        "ranks": "factorised: matrices are products of two",
        "heads": "compact: pruned parts are taken out",
        "neurons": "compact: pruned parts are taken out",
    }
    held = {"packed"} & {key for key in form if form[key]} | set(form.get("structure") or {})
    said = list(dict.fromkeys(text for key, text in forms.items() if key in held)) or [
        "plain: zeros are stored in full"
    ]
    what = "zeros, or saved by low rank," if "ranks" in held else "zeros"
    rows = [
        ("", ""),
        ("parameters", f"{parameters:,}"),
        (f"{what} among the prunable weights", f"{100 * zeros['prunable']:.1f} %"),
        (f"{what} in the encoder", f"{100 * zeros['encoder']:.1f} %"),
        (f"{what} in the model", f"{100 * zeros['model']:.1f} %"),
        ("bytes of the weights' file", f"{sum(file.stat().st_size for file in weight_files(folder)):,}"),
        ("form of the file", ", ".join(said)),
    ]
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for size, milliseconds in times.items():
        rows.append((f"milliseconds, batch of {size}, {tokens} tokens, {device}", f"{milliseconds:.1f}"))
    return f"## Size and speed\n\n{_table(rows)}"


def _training(results: Mapping[str, Any], pruning: PruningConfig | None) -> str:
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
    seeds = "- The metrics are of one seed, on data like that of training; other seeds differ by a point or more on small tasks.\n"
    return (
        f"## Limits\n\n{seeds if 'sparse' in results else ''}"
        "- Zeros alone make no model faster in stock PyTorch; a compact one, without pruned parts, is.\n"
        "- Licence, languages and biases are those of the base model and of the data it was trained on; pruning may have cost "
        "rare cases more than the averages show."
    )


def _versions(results: Mapping[str, Any]) -> str:
    versions = results.get("environment") or {
        "hf_disparse": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])

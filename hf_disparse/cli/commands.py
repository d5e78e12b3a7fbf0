"""The commands: each reads its options, calls one function of a wing below, and prints what that returns.

Under torchrun or `accelerate launch` all processes work and the first one prints.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from hf_disparse.cli.options import experiment_of, numbers_or_names
from hf_disparse.cli.quiet import quiet, rank
from hf_disparse.cli.tables import (
    close_bars,
    new_table,
    print_analysis,
    print_comparison,
    print_plan,
    print_results,
    print_shrunk,
    print_sparsity,
    print_speed,
)
from hf_disparse.config.rows import help_text
from hf_disparse.tasks.averages import average_name

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune one shared Transformer encoder with several task heads, by the vote of all tasks.",
)

_Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe. May be given several times."
    ),
]

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or Hub id.")]
_Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Data type of the weights. Default: unchanged.")
]


@contextmanager
def _stopping(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, prints in one line how to resume and exits with 130 or 143."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        close_bars()
        if not rank():
            print(f"stopped; {how_to_go_on()}", file=sys.stderr)
        raise typer.Exit(getattr(stop, "code", 130)) from None


def _version(show: bool) -> None:
    if show:
        print(f"hf_disparse {metadata.version('hf_disparse')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options without a command."""


@app.command(epilog="Example: hf-disparse train recipes/quickstart.yaml --set pruning.sparsity=0.9 --output_dir out-90")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/quickstart.yaml.")],
    overrides: _Set = [],  # noqa: B006
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", "--output-dir", help="Folder to write to. Default: the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--dry_run", help="Check the recipe, data and model without training.")
    ] = False,
    analysis: Annotated[bool, typer.Option(help="Finish with a short version of `analyze`.")] = True,
) -> None:
    """Train a dense model, prune it, train it sparse, evaluate both. Run it again to continue where it stopped."""
    quiet()
    from hf_disparse.recipes.recipe import read_recipe

    parsed = read_recipe(recipe, overrides, output_dir)  # before the libraries load: a mistyped key is answered at once
    from hf_disparse.runs import analyze
    from hf_disparse.runs import train as run

    if dry_run:
        print_plan(run.plan(parsed))
        return
    with _stopping(lambda: f"the same command goes on from {run.progress(parsed)}"):
        results = run.train(parsed)
        print_results(results, parsed.output_dir)
        found = analyze.after_training(parsed) if analysis else None
    if found:
        print_analysis(found, parsed.output_dir)


@app.command(epilog="Example: hf-disparse evaluate runs/quickstart --set 'tasks.*.max_validation_rows=500'")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that `train` wrote.")],
    recipe_path: Annotated[
        str | None, typer.Option("--recipe", help="Recipe with the tasks and data. Default: the model's own.")
    ] = None,
    overrides: _Set = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Run without the zeros, several times as fast on a CPU.")
    ] = False,
) -> None:
    """Evaluate a model on the validation data of its tasks."""
    quiet()
    from hf_disparse.runs.evaluate import evaluate as evaluated

    result = evaluated(model, recipe_path, overrides, fast)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = new_table("task", "metric", "value")
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.1f}")
    table.add_section()
    table.add_row(average_name(result["tasks"]), "", f"{result['average']:.1f}")
    Console().print(table)
    print_sparsity(result["sparsity"])
    print_speed(result["speed"], model)


@app.command(
    epilog="Example: hf-disparse shrink runs/quickstart/dense --recipe recipes/quickstart.yaml --speedup 3 --output_dir faster"
)
def shrink(
    model: _Model,
    output_dir: Annotated[str, typer.Option("--output_dir", "--output-dir", help="New folder to write to.")],
    speedup: Annotated[float | None, typer.Option(help="How many times as fast as now.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency_ms", "--latency-ms", help="Instead: milliseconds of one pass.")
    ] = None,
    runtime: Annotated[
        Literal["fast", "torch"], typer.Option(help="Where the model will run: `speed_up`, or plain PyTorch.")
    ] = "fast",
    batch: Annotated[int, typer.Option(help="Texts in a pass.")] = 32,
    length: Annotated[int | None, typer.Option(help="Tokens of a text. Default: the recipe's max_length.")] = None,
    threads: Annotated[int, typer.Option(help="Cores.")] = 1,
    score_batches: Annotated[
        int, typer.Option("--score_batches", "--score-batches", help="Batches per task that judge and refit.")
    ] = 16,
    recipe_path: Annotated[
        str | None, typer.Option("--recipe", help="Recipe with the tasks and data. Default: the model's own.")
    ] = None,
    overrides: _Set = [],  # noqa: B006
) -> None:
    """Make a finished model several times as fast, in minutes and without training."""
    quiet()
    from hf_disparse.config import SpeedConfig

    config = SpeedConfig(
        speedup=speedup,
        latency_ms=latency_ms,
        runtime=runtime,
        batch=batch,
        length=length,
        threads=threads,
        score_batches=score_batches,
    )
    from hf_disparse.runs.shrink import shrink_model

    with _stopping(lambda: f"nothing was written to {output_dir}"):
        results = shrink_model(model, output_dir, config, recipe_path, overrides)
    print_shrunk(results, output_dir)


@app.command(
    epilog="Example: hf-disparse compare recipes/quickstart.yaml --methods dense,random,magnitude,joint,unanimous "
    "--sparsities 0.7,0.9 --seeds 1,2,3"
)
def compare(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file. Every method gets its number of backward passes.")
    ],
    methods: Annotated[
        str | None,
        typer.Option(help=f"{help_text()}. Default: dense,random,magnitude,joint,unanimous."),
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(help="For methods that work with several: snip, disparse, fisher. Default: the recipe's."),
    ] = None,
    sparsities: Annotated[str | None, typer.Option(help="Separated by commas. Default: the recipe's.")] = None,
    seeds: Annotated[str, typer.Option(help="All methods start from the same dense model, one per seed.")] = "1,2,3",
    protocol: Annotated[
        Literal["methods", "equal-budget"],
        typer.Option(
            help="equal-budget: the best ensemble of single-task models against the shared model, at each budget."
        ),
    ] = "methods",
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Only with equal-budget: kept weights, as fractions of one encoder. Default: 1 - sparsities."
        ),
    ] = None,
    overrides: _Set = [],  # noqa: B006
    output_dir: Annotated[
        str | None,
        typer.Option(
            "--output_dir", "--output-dir", help="Folder to write to. Default: the recipe's, with -compare appended."
        ),
    ] = None,
) -> None:
    """Compare pruning methods on one recipe, each at the same number of backward passes, over several seeds.

    Run it again to continue where it stopped; other methods, sparsities and seeds add rows to the same folder.
    """
    quiet()
    from hf_disparse.recipes.recipe import read_recipe

    parsed = read_recipe(recipe, overrides, output_dir)  # before the libraries load: a mistyped key is answered at once
    from hf_disparse.compare.runner import progress

    if output_dir is None:
        folder = parsed.output_dir.rstrip("/") + "-compare"
        parsed = replace(parsed, output_dir=folder, values={**parsed.values, "output_dir": folder})
    experiment = experiment_of(parsed, protocol, methods, criteria, sparsities, seeds, budgets)
    with _stopping(lambda: f"{progress(experiment.folder, experiment.cells)}, the same command goes on"):
        report = experiment.run()
    print_comparison(report, parsed.output_dir, experiment)


@app.command(name="analyze", epilog="Example: hf-disparse analyze runs/quickstart --within 2")
def analyze_(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A folder that `train` wrote, or a model's.")],
    recipe_path: Annotated[
        str | None, typer.Option("--recipe", help="Recipe with the tasks and data. Default: the folder's own.")
    ] = None,
    overrides: _Set = [],  # noqa: B006
    sparsities: Annotated[
        str, typer.Option(help="Points of the cost curve, which needs a dense model. 0 leaves the curve out.")
    ] = "0.3,0.5,0.6,0.7,0.8,0.9,0.95",
    within: Annotated[
        float | None, typer.Option(help="Stop the curve when a task has lost more than this many points.")
    ] = None,
    recover: Annotated[int, typer.Option(help="Train each point of the curve for this many steps.")] = 0,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", "--output-dir", help="Folder to write to. Default: the model's.")
    ] = None,
) -> None:
    """Show which weights each task needs, where the tasks diverge and what sparsity costs, as a report.

    A run is analyzed before training, dense and sparse. More scoring batches (--set pruning.score_batches=64) give narrower
    intervals.
    """
    quiet()
    from hf_disparse.runs import analyze

    curve = analyze.Curve(tuple(numbers_or_names(sparsities, "--sparsities", float)), within, recover)
    print_analysis(*analyze.analyze(model, recipe_path, overrides, curve=curve, output_dir=output_dir))


@app.command(
    epilog="Example: hf-disparse export runs/quickstart --format packed --output_dir published --dtype bfloat16"
)
def export(
    model: _Model,
    output_dir: Annotated[str, typer.Option("--output_dir", "--output-dir", help="New folder to write to.")],
    format_: Annotated[
        Literal["packed", "compact", "task", "onnx"],
        typer.Option(
            "--format",
            help="packed: non-zeros and one bit per weight; compact: pruned heads, neurons, layers and ranks removed; "
            "task: plain transformers models; onnx: one task, checked in onnxruntime.",
        ),
    ] = "packed",
    task: Annotated[
        str | None,
        typer.Option(help="Only with task (default: every task, into tasks/NAME) and onnx."),
    ] = None,
    dtype: _Dtype = None,
) -> None:
    """Write a model in a form to publish. A compact model or a task can be packed afterwards."""
    quiet()
    from hf_disparse.config import UserError

    if task is not None and format_ not in ("task", "onnx"):
        raise UserError("--task: only applies to --format task and --format onnx")
    if dtype is not None and format_ == "onnx":
        raise UserError("--dtype: does not apply to --format onnx, which is float32")
    import torch

    from hf_disparse import export

    wanted = getattr(torch, dtype) if dtype else None
    if format_ == "task":
        for folder in export.save_tasks(model, output_dir, task, wanted):
            print(f"written: {folder}")
    elif format_ == "onnx":
        report = export.save_onnx(model, output_dir, task)
        print(
            f"logits differ by {report['difference']:.1g}; onnxruntime is {report['speed']:.2f} times as fast as torch"
        )
        print(f"written: {output_dir}")
    elif format_ == "compact":
        with _with_card(output_dir) as folder:
            parts = export.save_compact(model, folder, wanted)
        print(", ".join(f"{now} of {before} {kind}s" for kind, (before, now) in parts.items()))
        print(f"written: {output_dir}")
    else:
        with _with_card(output_dir) as folder:
            sizes = export.save_packed(model, folder, wanted)
        if sizes["matrices"]:
            share = 100 * sizes["packed_bytes"] / sizes["packed_dense_bytes"]
            print(f"{sizes['matrices']} sparse matrices: {share:.1f} % of their dense bytes")
        else:
            print("no matrix is sparse enough to be smaller when packed: this model is dense")
        print(f"written: {output_dir}, {sizes['bytes']:,} bytes of {sizes['dense_bytes']:,} dense")


@contextmanager
def _with_card(output_dir: str) -> Iterator[Path]:
    """Yields a new folder for a model and adds its card; the folder appears with both or not at all."""
    from hf_disparse import export
    from hf_disparse.files import new_folder

    with new_folder(output_dir) as folder:
        yield folder
        if export.is_multitask(folder):
            export.write_card(folder, Path(output_dir).resolve().name)


@app.command(
    epilog="Example: hf-disparse push runs/quickstart me/quickstart-sparse --dtype bfloat16 --license apache-2.0"
)
def push(
    model: _Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="USER/NAME; created if it does not exist.")],
    format_: Annotated[
        Literal["packed", "compact", "plain"], typer.Option("--format", help="As in export; plain: unchanged.")
    ] = "packed",
    dtype: _Dtype = None,
    with_tasks: Annotated[
        bool, typer.Option("--with-tasks", help="Also upload every task as a plain model into tasks/NAME.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", help="License for the card, such as apache-2.0. The base model's license applies too."
        ),
    ] = None,
    token: Annotated[str | None, typer.Option(help="Default: the one from `hf auth login`.")] = None,
) -> None:
    """Export a model with its card and upload it to the Hub in one commit."""
    quiet()
    import torch

    from hf_disparse import export

    wanted = getattr(torch, dtype) if dtype else None
    options = {
        "dtype": wanted,
        "with_tasks": with_tasks,
        "private": private or None,
        "license": license_,
        "token": token,
    }
    print(f"pushed: {export.push(model, repo_id, format_, **options)}")

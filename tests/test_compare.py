"""`hf-disparse compare`: which cells there are, that all have the same budget, and what stopping and failing leave."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_disparse import DisparseTrainer, PruningConfig, compare, run
from hf_disparse.compare import Cell
from hf_disparse.recipes import parse_recipe
from tests.cli_helpers import changed, hf_disparse, refused, snapshot, without, write_csv, write_inputs, write_recipe
from tests.tiny import VOCABULARY

torch.set_num_threads(1)

# What each method asks for, by hand; the inputs' own pruning section asks for a quorum of 2 by fisher.
FIELDS = {
    "dense": {"sparsity": 0.0, "decision": "unanimous", "quorum": 1},
    "random": {"criterion": "random", "decision": "unanimous", "quorum": 1},
    "magnitude": {"criterion": "magnitude", "decision": "unanimous", "quorum": 1},
    "joint": {"criterion": "fisher", "decision": "joint", "quorum": 1},
    "unanimous": {"criterion": "fisher", "decision": "unanimous", "quorum": 1},
    "quorum2": {"criterion": "fisher", "decision": "quorum", "quorum": 2},
    "sum": {"criterion": "fisher", "decision": "sum", "quorum": 1},
    "max": {"criterion": "fisher", "decision": "max", "quorum": 1},
    "mean": {"criterion": "fisher", "decision": "mean_rank", "quorum": 1},
    "quorum1": {"criterion": "fisher", "decision": "unanimous", "quorum": 1},
}
FIRST, LATER = list(FIELDS)[:6], list(FIELDS)[6:]
REPORTS = ("compare.json", "compare.md")


def compared(recipe: dict, *words) -> SimpleNamespace:
    """`hf-disparse compare` on the recipe, and for every training, by its folder, the backward passes torch was asked for."""
    folder = Path(
        words[words.index("--output_dir") + 1] if "--output_dir" in words else f"{recipe['output_dir']}-compare"
    )
    path = write_recipe(Path(recipe["output_dir"]).parent, recipe)
    trainings, passes, place = Counter(), Counter(), []
    train = DisparseTrainer.train

    def training(self, *args, **kwargs):
        place.append(str(Path(self.args.output_dir).relative_to(folder)))
        trainings[place[-1]] += 1
        return train(self, *args, **kwargs)

    def counting(function):
        def counted(*args, **kwargs):
            passes[place[-1]] += 1
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DisparseTrainer, "train", training)
        patch.setattr(torch.Tensor, "backward", counting(torch.Tensor.backward))
        patch.setattr(torch.autograd, "grad", counting(torch.autograd.grad))
        status, out, err = hf_disparse("compare", path, *words)
    report = json.loads((folder / "compare.json").read_text()) if (folder / "compare.json").is_file() else None
    cells = {place: number for place, number in passes.items() if place.startswith("cells/")}
    return SimpleNamespace(
        status=status, out=out, err=err, report=report, folder=folder, trainings=trainings, passes=cells
    )


def figures(folder: Path) -> dict[str, dict]:
    """Cell -> its metrics, of all that are finished."""
    return {path.stem: json.loads(path.read_text())["metrics"] for path in Path(folder, "cells").glob("*.json")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A recipe of a task of two classes and one of regression, whose correlations tell any two models apart."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = write_inputs(folder)
    data = str(write_csv(folder / "real.csv", [0.1, 0.4, 1.0], rows=40, seed=5))
    real = {"data": data, "columns": "text", "problem_type": "regression", "validation_fraction": 0.25}
    recipe["tasks"] = {"two": recipe["tasks"]["two"], "real": {**real, "metric": ["pearson", "spearmanr"]}}
    recipe["pruning"] |= {"criterion": "fisher", "decision": "quorum", "quorum": 2}
    return changed(recipe, "training.learning_rate", 1e-2)


@pytest.fixture
def recipe(inputs, tmp_path) -> dict:
    return {**inputs, "output_dir": str(tmp_path / "run")}


COMMAND = ("--methods", ",".join(FIRST), "--seeds", "2,1")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> SimpleNamespace:
    """A comparison of six methods and two seeds in the default folder. Tests that change it copy it first."""
    done = compared({**inputs, "output_dir": str(tmp_path_factory.mktemp("finished") / "run")}, *COMMAND)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def extended(finished, inputs, tmp_path_factory) -> list[SimpleNamespace]:
    """A copy of the finished comparison, then with other methods, then with another seed."""
    folder = shutil.copytree(finished.folder, tmp_path_factory.mktemp("extended") / "moved")
    recipe = {**inputs, "output_dir": str(folder.parent / "unused")}
    commands = [
        ("--methods", ",".join(["dense", "joint", *LATER]), "--seeds", "2"),
        ("--methods", "dense,magnitude", "--seeds", "1,2,3"),
    ]
    done = []
    for words in commands:
        before = snapshot(folder)
        done.append(compared(recipe, *words, "--output_dir", str(folder)))
        assert done[-1].status == 0, done[-1].err
        after = snapshot(folder)
        done[-1].touched = {name for name in before if name not in REPORTS and after.get(name) != before[name]}
    return done


# The grid


def test_the_grid_goes_seed_by_seed_and_holds_no_cell_twice():
    methods = ["dense", "random", "magnitude", "joint", "unanimous", "joint"]
    cells = compare.grid(methods, ["snip", "fisher", "snip"], [0.5, 0.7, 0.5], [3, 1, 3])
    wanted = []
    for seed in (3, 1):
        wanted.append(("dense", "", 0.0, seed))
        for sparsity in (0.5, 0.7):
            for method in ("random", "magnitude"):
                wanted.append((method, "", sparsity, seed))
            for method in ("joint", "unanimous"):
                wanted += [(method, "snip", sparsity, seed), (method, "fisher", sparsity, seed)]
    assert [(c.method, c.criterion, c.sparsity, c.seed) for c in cells] == wanted
    assert len({cell.name for cell in cells}) == len(wanted) == 2 * (1 + 2 * 6)


@pytest.mark.xfail(strict=True, reason="a file's name has six digits of the sparsity")
def test_cells_of_close_sparsities_have_files_of_their_own():
    cells = compare.grid(["magnitude"], ["fisher"], [0.7000001, 0.7000002], [1])
    assert len({cell.name for cell in cells}) == 2


@pytest.mark.parametrize("method", FIELDS)
def test_a_method_asks_for_its_criterion_and_decision(method):
    (cell,) = compare.grid([method], ["fisher"], [0.7], [1])
    assert cell.pruning() == {"sparsity": 0.7, **FIELDS[method]}
    PruningConfig(**cell.pruning())  # which refuses a quorum where none is


def test_every_method_is_one_of_those_tested_and_in_the_help():
    assert set(compare.METHODS) == FIELDS.keys() - {"quorum1"}
    status, out, _ = hf_disparse("compare", "--help")
    said = re.sub(r"[\s│]+", " ", out)
    assert status == 0 and ", ".join(m for m in compare.METHODS if m != "quorum2" and m != "unanimous") in said
    assert "Example: hf-disparse compare " in said and "snip, disparse, fisher" in said


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--methods", "dense,unanimus"], ("--methods", "'unanimus'", "did you mean 'unanimous'")),
        (["--methods", "quorum0"], ("--methods", "'quorum0'")),
        (["--methods", "quorum3"], ("quorum", "number of tasks, 2", "got 3")),
        (["--methods", " , "], ("--methods", "commas")),
        (["--criteria", "snipp"], ("--criteria", "did you mean 'snip'")),
        (["--sparsities", "0.5,0"], ("--sparsities", "(0, 1)", "0.0")),
        (["--sparsities", "1"], ("--sparsities", "(0, 1)", "1.0")),
        (["--sparsities=-0.5"], ("--sparsities", "(0, 1)", "-0.5")),
        (["--sparsities", "nan"], ("--sparsities", "(0, 1)", "nan")),
        (["--sparsities", "half"], ("--sparsities", "'half'")),
        (["--seeds", "1,x"], ("--seeds", "'1,x'")),
        (["--seeds=-1"], ("seed", "at least 0", "-1")),
    ],
)
def test_what_the_grid_cannot_hold_is_named_and_nothing_is_written(recipe, tmp_path, words, names):
    path = write_recipe(tmp_path, recipe)
    before = snapshot(tmp_path)
    refused("compare", path, *words, names=names)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("epochs", [True, False])
def test_a_budget_in_epochs_is_refused_by_name(recipe, tmp_path, epochs):
    recipe = changed(without(recipe, "training.max_steps"), "training.num_train_epochs", 2) if epochs else recipe
    recipe = recipe if epochs else changed(recipe, "recovery.max_steps", -1)
    path = write_recipe(tmp_path, recipe)
    refused("compare", path, names=("recovery.max_steps", "number of steps", "-1"))
    assert not Path(f"{recipe['output_dir']}-compare").exists()


@pytest.mark.xfail(strict=True, reason="only the first cell is rehearsed, and the dense one does not prune")
@pytest.mark.parametrize(("key", "value"), [("target_modules", ["nothing"]), ("start_step", 4)])
def test_pruning_that_no_cell_can_do_is_refused_before_anything_is_trained(recipe, key, value):
    done = compared(changed(recipe, f"pruning.{key}", value), "--methods", "dense,joint", "--seeds", "1")
    assert done.status == 2 and not done.trainings


# The budget


def test_every_cell_has_the_backward_passes_that_the_report_states(finished):
    """4 steps, and 2 batches of each of 2 tasks to score."""
    assert finished.passes == {f"cells/{name}": 4 + 2 * 2 for name in figures(finished.folder)}
    assert len(finished.passes) == 12
    assert finished.report["backward_passes"] == 8 and "had 8 backward passes" in finished.out


def _mark(*values, reason: str):
    return pytest.param(*values, marks=pytest.mark.xfail(strict=True, reason=reason))


CUBIC = {"pruning.schedule": "cubic", "pruning.start_step": 0, "pruning.end_step": 4, "pruning.update_every": 2}
ALL = {
    **CUBIC,
    "pruning.score_batches": 3,
    "training.gradient_accumulation_steps": 2,
    "training.loss_weighting": "pcgrad",
    "training.distillation": 0.5,
    "recovery.max_steps": 6,
}


@pytest.mark.parametrize(
    ("changes", "helper", "passes"),
    [
        ({"training.gradient_accumulation_steps": 2}, False, 4 * 2 + 2 * 2),
        (ALL, False, 6 * 2 + 2 * 3 * 2),  # two updates, at steps 2 and 4
        (ALL | {"pruning.quorum": 1}, True, 6 * 2 + 1 * 3 * 2 + 6),  # one vote fewer ...
        _mark({"training.gradient_accumulation_steps": 3}, False, 4 * 3 + 2 * 2, reason="16 is no multiple of 3"),
        _mark(  # an epoch has 16 batches, so that the last step of each has 2 of the 7
            {"training.gradient_accumulation_steps": 7, "pruning.score_batches": 7},
            False,
            (7 + 7 + 2 + 7) + 2 * 7,
            reason="the last step of an epoch has fewer batches",
        ),
        _mark(
            {"pruning.sparsity": 0.0}, False, 4 + 2 * 2, reason="the recipe's own sparsity is 0, so it does not score"
        ),
        _mark(
            CUBIC | {"pruning.end_step": 40, "pruning.update_every": 1, "recovery.max_steps": 42},
            False,
            42 + 2 * 2 * 40,
            reason="the last updates prune no weight more, so they do not score",
        ),
    ],
)
def test_the_budget_is_the_same_for_all_whatever_the_recipe(recipe, changes, helper, passes):
    for key, value in changes.items():
        recipe = changed(recipe, key, value)
    if helper:  # the third task trains the dense model only: 3 tasks, two votes
        recipe = changed(recipe, "tasks.third", recipe["tasks"]["two"]) | {"helpers": ["third"]}
    done = compared(recipe, "--methods", "dense,magnitude,joint,unanimous", "--sparsities", "0.6", "--seeds", "1")
    assert done.status == 0, done.err
    assert len(done.passes) == 4 and set(done.passes.values()) == {passes}, done.passes
    assert done.report["backward_passes"] == passes


# Results


@pytest.mark.parametrize("method", FIELDS)
def test_a_cell_is_what_train_makes_of_its_recipe(extended, recipe, method):
    steps = 4 + 2 * 2 if method in ("dense", "random", "magnitude") else 4
    values = recipe | {"seed": 2, "recovery": {"max_steps": steps}}
    values["pruning"] = {"sparsity": 0.7, "score_batches": 2, **FIELDS[method]}
    results = run.train(parse_recipe(values))
    name = {"criterion": "", **FIELDS[method]}["criterion"]
    parts = [method, "" if name == method else name, "" if method == "dense" else "0.7", "seed2"]
    file = extended[0].folder / "cells" / ("-".join(part for part in parts if part) + ".json")
    cell = json.loads(file.read_text())
    assert cell["metrics"] == results["sparse"]
    assert cell["sparsity"] == {k: v for k, v in results["sparsity"].items() if k != "target"}
    assert cell["bytes"] == results["bytes"]["sparse"] and cell["examples"] == results["examples"]


def test_the_methods_differ_and_a_quorum_of_one_is_unanimity(extended):
    """Otherwise equal metrics would prove nothing."""
    ours = {name: m for name, m in figures(extended[0].folder).items() if name.endswith("seed2")}
    assert ours.pop("quorum1-fisher-0.7-seed2") == ours["unanimous-fisher-0.7-seed2"]
    assert len({json.dumps(m) for m in ours.values()}) == len(ours) == 9


# Reuse


def test_one_dense_model_per_seed_and_one_training_per_cell(finished):
    """Beside the dense models nothing but results is left."""
    cells = [f"{c}-seed{s}" for s in (2, 1) for c in ("dense", "random-0.7", "magnitude-0.7")]
    cells += [f"{m}-fisher-0.7-seed{s}" for s in (2, 1) for m in ("joint", "unanimous", "quorum2")]
    assert finished.trainings == {name: 1 for name in ("dense-seed2", "dense-seed1", *(f"cells/{c}" for c in cells))}
    assert {p.name for p in finished.folder.joinpath("cells").iterdir()} == {f"{cell}.json" for cell in cells}
    assert {p.name for p in finished.folder.iterdir()} == {
        "recipe.yaml",
        "cells",
        "dense-seed1",
        "dense-seed2",
        *REPORTS,
    }
    assert not list(finished.folder.rglob("checkpoint-*"))
    assert finished.folder.name == "run-compare" and not finished.folder.with_name("run").exists()


def test_the_same_command_again_loads_and_trains_nothing(finished, monkeypatch):
    before = snapshot(finished.folder)
    monkeypatch.setattr(compare, "prepare", lambda *_: pytest.fail("a finished comparison loads no data"))
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = hf_disparse("compare", finished.folder.with_name("recipe.yaml"), *COMMAND)
    after = snapshot(finished.folder)
    assert status == 0 and after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name not in REPORTS)
    assert all(after[name][0] == before[name][0] for name in REPORTS)
    shown = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert shown == parsed_table((finished.folder / "compare.md").read_text())[1:]


def test_other_methods_and_seeds_add_cells_and_touch_nothing(extended, finished):
    methods, seeds = extended
    assert methods.trainings == {f"cells/{method}-fisher-0.7-seed2": 1 for method in LATER}
    assert seeds.trainings == {"dense-seed3": 1, "cells/dense-seed3": 1, "cells/magnitude-0.7-seed3": 1}
    assert methods.touched == seeds.touched == set()
    assert [row["method"] for row in methods.report["rows"]] == ["dense", "joint", *LATER]
    assert [(row["method"], row["seeds"]) for row in seeds.report["rows"]] == [
        ("dense", [1, 2, 3]),
        ("magnitude", [1, 2, 3]),
    ]
    assert figures(finished.folder).items() <= figures(seeds.folder).items()


def test_a_folder_of_another_recipe_is_refused(finished):
    before = snapshot(finished.folder)
    path = finished.folder.with_name("recipe.yaml")
    names = ("output_dir", "pruning, seed", "--output_dir")
    for words in (COMMAND, ("--methods", "sum")):
        refused("compare", path, *words, "--set", "seed=5", "--set", "pruning.sparsity=0.1", names=names)
    assert snapshot(finished.folder) == before


# Failing and stopping

FEW = ("--methods", "dense,joint,magnitude", "--seeds", "2")


def _same_in_the_end(recipe: dict, finished: SimpleNamespace) -> SimpleNamespace:
    """The next run of FEW ends in the figures of the undisturbed comparison."""
    done = compared(recipe, *FEW)
    assert done.status == 0 and done.report["failed"] == {}, done.err
    names = ("dense-seed2", "joint-fisher-0.7-seed2", "magnitude-0.7-seed2")
    assert figures(done.folder) == {name: figures(finished.folder)[name] for name in names}
    assert [cell["metrics"] for cell in done.report["cells"]] == [figures(finished.folder)[name] for name in names]
    return done


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(recipe, finished, monkeypatch):
    def failing(config, *args):
        if config.decision == "joint":
            raise RuntimeError("no luck\ntoday")
        return decide(config, *args)

    from hf_disparse.trainer import callback

    decide = callback.decide_by
    with monkeypatch.context() as patch:
        patch.setattr(callback, "decide_by", failing)
        done = compared(recipe, *FEW)
    name = "joint-fisher-0.7-seed2"
    assert done.status == 1 and f"failed: {name}: no luck today" in done.err.splitlines()
    assert done.report["failed"] == {name: "no luck today"}
    assert f"{name}: no luck today" in (done.folder / "compare.md").read_text()
    assert [row["method"] for row in done.report["rows"]] == ["dense", "magnitude"]
    again = _same_in_the_end(recipe, finished)
    assert again.trainings == {f"cells/{name}": 1} and "no luck" not in (done.folder / "compare.md").read_text()


def test_no_table_where_every_cell_fails(recipe, finished, monkeypatch):
    def failing(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(DisparseTrainer, "save_model", failing)
        done = compared(recipe, *FEW)
    assert done.status == 1 and done.report is None and "dense against" not in done.out
    assert sum(line.startswith("failed: ") and "no space left" in line for line in done.err.splitlines()) == 3
    _same_in_the_end(recipe, finished)


@pytest.mark.parametrize(
    ("place", "step", "done", "resumed"),
    [
        ("dense-seed2", 2, 0, "dense-seed2/checkpoint-2"),
        ("cells/dense-seed2", 5, 0, "cells/dense-seed2/checkpoint-4"),
        ("cells/joint-fisher-0.7-seed2", "scoring", 1, None),
        ("cells/joint-fisher-0.7-seed2", 3, 1, "cells/joint-fisher-0.7-seed2/checkpoint-2"),
        ("cells/magnitude-0.7-seed2", "tidying", 3, None),
    ],
)
def test_an_interrupt_says_how_far_it_is_and_the_next_run_goes_on(
    recipe, finished, monkeypatch, place, step, done, resumed
):
    def interrupting(function, here):
        def interrupted(*args, **kwargs):
            if here(*args):
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return interrupted

    def now(trainer, *_):
        return trainer.args.output_dir.endswith(f"-compare/{place}") and trainer.state.global_step == step

    with monkeypatch.context() as patch:
        if step == "scoring":
            patch.setattr(torch.autograd, "grad", interrupting(torch.autograd.grad, lambda *_: True))
        elif step == "tidying":
            patch.setattr(shutil, "rmtree", interrupting(shutil.rmtree, lambda path, *_: str(path).endswith(place)))
        else:
            patch.setattr(DisparseTrainer, "training_step", interrupting(DisparseTrainer.training_step, now))
        stopped = compared(recipe, *FEW)
    assert stopped.status == 130 and f"stopped; {done} of 3 cells are done" in stopped.err
    assert stopped.report is None
    again = _same_in_the_end(recipe, finished)
    assert not any(f"cells/{name}" in again.trainings for name in ("dense-seed2", "joint-fisher-0.7-seed2")[:done])
    assert (f"resumed from {again.folder}/{resumed}" in again.err) if resumed else "resumed from" not in again.err


_KILLED = """
import os, signal, sys, torch
from hf_disparse import DisparseTrainer, cli
torch.set_num_threads(1)
step = DisparseTrainer.training_step
def dying(trainer, *arguments):
    if "magnitude" in trainer.args.output_dir and trainer.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *arguments)
DisparseTrainer.training_step = dying
cli.main()
"""


def test_a_process_killed_in_a_cell_goes_on_to_the_same_figures(recipe, finished, tmp_path):
    command = [sys.executable, "-c", _KILLED, "compare", write_recipe(tmp_path, recipe), *FEW]
    ended = subprocess.run(command, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    again = _same_in_the_end(recipe, finished)
    assert again.trainings == {"cells/magnitude-0.7-seed2": 1}
    assert f"resumed from {again.folder}/cells/magnitude-0.7-seed2/checkpoint-6" in again.err


# The table


def result(two: float, pearson: float, spearmanr: float, average: float, seconds: float = 1.0) -> dict:
    tasks = {"two": {"accuracy": two}, "real": {"pearson": pearson, "spearmanr": spearmanr}}
    return {"metrics": {"tasks": tasks, "average": average}, "seconds": {"a": seconds, "b": 1.0}}


DENSE = {
    Cell("dense", "", 0.0, 1): result(90.0, 60.0, 80.0, 80.0),
    Cell("dense", "", 0.0, 2): result(92.0, 71.0, 73.0, 82.0),
    Cell("dense", "", 0.0, 4): result(97.0, 79.0, 75.0, 87.0),
}
JOINT = {
    Cell("joint", "snip", 0.75, 1): result(80.0, 60.0, 60.0, 70.0, 2.0),
    Cell("joint", "snip", 0.75, 2): result(80.0, 60.0, 80.0, 75.0, 4.0),
    Cell("joint", "snip", 0.75, 3): result(90.0, 90.0, 90.0, 90.0, 9.0),
}


def test_rows_are_mean_sample_deviation_and_the_difference_from_dense_of_the_same_seed():
    dense, joint = compare.tabulate(DENSE | JOINT)
    assert [dense[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["dense", "", 0.0, [1, 2, 4]]
    assert dense["mean"] == pytest.approx({"average": 83, "two": 93, "real": (70 + 72 + 77) / 3})
    # deviations 3, 1, 4 and 3, 1, 4 and 3, 1, 4, over 3 - 1
    assert dense["spread"] == pytest.approx(dict.fromkeys(("average", "two", "real"), math.sqrt(26 / 2)))
    assert dense["against_dense"] == 0 and dense["seconds"] == 2
    assert [joint[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["joint", "snip", 0.75, [1, 2, 3]]
    assert joint["mean"] == pytest.approx({"average": 235 / 3, "two": 250 / 3, "real": (60 + 70 + 90) / 3})
    assert joint["spread"]["average"] == pytest.approx(math.sqrt((25**2 + 10**2 + 35**2) / 9 / 2))
    assert joint["against_dense"] == pytest.approx((70 - 80 + 75 - 82) / 2)  # seeds 1 and 2, which both have
    assert joint["seconds"] == (3 + 5 + 10) / 3


def test_one_seed_has_no_spread_and_without_dense_there_is_no_difference():
    (row,) = compare.tabulate(dict([next(iter(JOINT.items()))]))
    assert row["spread"] == {"average": None, "two": None, "real": None} and row["against_dense"] is None
    dense, joint = compare.tabulate(dict([list(DENSE.items())[2], *JOINT.items()]))  # seed 4 against 1, 2, 3
    assert dense["spread"]["two"] is None and joint["spread"]["two"] is not None and joint["against_dense"] is None


def parsed_table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line of dashes."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert all(set(cell) <= set("-:") for cell in lines[1])
    return [lines[0], *lines[2:]]


def _check_table(text: str, rows: list[dict]) -> None:
    """The numbers that Markdown shows are those of the rows, to the digit shown."""
    header, *lines = parsed_table(text)
    assert header == ["method", "sparsity", "two", "real", "average", "against dense", "seeds"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line[0].split() == [word for word in (row["method"], row["criterion"]) if word]
        assert float(line[1].removesuffix("%")) == pytest.approx(100 * row["sparsity"])
        for name, cell in zip(("two", "real", "average"), line[2:5], strict=True):
            value, _, spread = cell.partition("±")
            assert float(value) == pytest.approx(row["mean"][name], abs=0.0501)
            assert (float(spread) if spread else None) == pytest.approx(row["spread"][name], abs=0.0501)
        difference = None if row["method"] == "dense" else row["against_dense"]
        assert (float(line[5]) if line[5] else None) == pytest.approx(difference, abs=0.0501)
        assert int(line[6]) == len(row["seeds"])


def test_markdown_parses_back_to_the_rows(finished):
    _check_table((finished.folder / "compare.md").read_text(), finished.report["rows"])
    sizes = {"validation": {"two": 1234, "real": 8}}
    for results in (DENSE | JOINT, DENSE, JOINT, dict(list(DENSE.items())[:1])):
        report = {
            "rows": compare.tabulate(results),
            "failed": {"max-x": "why"},
            "examples": sizes,
            "backward_passes": 12345,
        }
        text = compare.markdown(report)
        _check_table(text, report["rows"])
        assert "two 1,234, real 8 held-out examples" in text and "12,345 backward passes" in text
        assert "max-x: why" in text


def test_the_report_has_the_documented_schema(finished):
    report = finished.report
    assert list(report) == ["rows", "cells", "failed", "backward_passes", "examples", "environment"]
    assert report["failed"] == {} and {"hf_disparse", "torch", "transformers"} <= report["environment"].keys()
    assert report["examples"] == {"train": {"two": 24, "real": 30}, "validation": {"two": 8, "real": 10}}
    assert [(cell["method"], cell["seed"]) for cell in report["cells"]] == [(m, s) for s in (2, 1) for m in FIRST]
    for cell in report["cells"]:
        assert {"criterion", "sparsity", "metrics", "seconds", "bytes", "examples"} < cell.keys()
        values = [sum(m.values()) / len(m) for m in cell["metrics"]["tasks"].values()]
        assert cell["metrics"]["average"] == pytest.approx(sum(values) / 2)
    assert [row["method"] for row in report["rows"]] == FIRST
    keys = ["method", "criterion", "sparsity", "seeds", "mean", "spread", "against_dense", "seconds"]
    for row in report["rows"]:
        assert list(row) == keys and row["seeds"] == [2, 1] and list(row["mean"]) == ["average", "two", "real"]
        mine = [cell for cell in report["cells"] if cell["method"] == row["method"]]
        assert row["mean"]["average"] == pytest.approx(sum(cell["metrics"]["average"] for cell in mine) / 2)
        assert row["seconds"] == pytest.approx(sum(sum(cell["seconds"].values()) for cell in mine) / 2)


# Choosing the best model


def test_the_best_model_is_chosen_by_one_half_and_judged_by_the_other(recipe, tmp_path, monkeypatch):
    """The same halves for all seeds, together the held-out file."""
    data = tmp_path / "data"
    data.mkdir()
    write_csv(data / "train.csv", ["no", "yes"], rows=16, seed=8)
    write_csv(data / "validation.csv", ["no", "yes"], rows=13, seed=9)
    with (data / "validation.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    held_out = {tuple([2, *map(VOCABULARY.index, text.split()), 3]) for text in texts}
    task = {"data": str(data), "columns": "text", "labels": ["no", "yes"]}
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "average",
    }
    chosen = without(changed(recipe, "tasks.two", task) | {"training": recipe["training"] | best}, "tasks.real")
    chosen = changed(changed(chosen, "pruning.decision", "unanimous"), "pruning.quorum", 1)
    evaluate, seen = DisparseTrainer.evaluate, []

    def evaluating(self, rows=None, *args, **kwargs):
        used = (self.eval_dataset if rows is None else rows)["two"]
        seen.append((rows is None, self.args.seed, frozenset(map(tuple, used["input_ids"])), len(used)))
        return evaluate(self, rows, *args, **kwargs)

    monkeypatch.setattr(DisparseTrainer, "evaluate", evaluating)
    done = compared(chosen, "--methods", "dense,unanimous", "--seeds", "1,2")
    assert done.status == 0, done.err
    assert {(seed, during) for during, seed, *_ in seen} == {(s, d) for s in (1, 2) for d in (True, False)}
    (selection,), (judged,) = ({rows for during, _, rows, _ in seen if during is when} for when in (True, False))
    assert len(held_out) == 13 and selection | judged == held_out and not selection & judged
    assert {size for *_, size in seen} == {6, 7} and done.report["examples"]["validation"] == {"two": len(judged)}
    assert f"on two {len(judged)} held-out examples" in done.out

"""Equal budget as it is run: equal passes for both sides, a table that says so, and what stopping and failing leave."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_disparse.compare.equal_budget import ModelCell, exact
from hf_disparse.pruning import granularity
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.runs import train as run
from tests.helpers.commands import changed, hf_disparse, snapshot, without, write_recipe
from tests.helpers.comparing import CELLS, COMMAND, counted, parsed_table, stopping, write_equal_budget

torch.set_num_threads(1)

REPORTS = ("equal-budget.json", "equal-budget.md")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_equal_budget(tmp_path_factory.mktemp("inputs"))


# The runs: 4 steps per task and phase, and 2 updates with 2 batches to score on


def compared(recipe: dict, *words: str) -> SimpleNamespace:
    return counted(recipe, *words, below="equal-budget", report=REPORTS[0])


def figures(report: dict) -> dict[ModelCell, dict]:
    return {ModelCell(c["task"], c["sparsity"], c["seed"]): c["metrics"] for c in report["cells"]}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> SimpleNamespace:
    """A comparison of two budgets and two seeds, which tests leave as it is."""
    done = compared({**inputs, "output_dir": str(tmp_path_factory.mktemp("finished") / "run")}, *COMMAND)
    assert done.status == 0, done.err
    return done


def test_both_sides_have_the_same_number_of_backward_passes_and_the_report_states_it(finished):
    singles, shared = 4, 8
    wanted = {
        f"dense-{who}-seed{seed}": n for seed in (1, 2) for who, n in (("task-two", 4), ("task-real", 4), ("shared", 8))
    }
    scoring = 2 * 2  # updates, and batches per task
    for task, sparsity, seed in CELLS:
        steps = shared + 2 * scoring if task is None else singles + scoring
        wanted[f"cells/{ModelCell(task, sparsity, seed).name}"] = steps
    assert finished.passes == wanted
    total = 2 * (4 + 4 + scoring)
    assert {row["backward_passes"] for row in finished.report["rows"]} == {total}
    assert f"{total} backward passes per ensemble and {total} per shared model" in " ".join(finished.out.split())


@pytest.mark.parametrize(
    "cell", [ModelCell("real", 0.8, 2), ModelCell("two", 0.6, 1), ModelCell(None, 0.7, 2)], ids=lambda c: c.name
)
def test_a_cell_is_what_train_makes_of_its_recipe(finished, recipe, cell):
    times = 1 if cell.task else 2
    recipe["seed"] = cell.seed
    recipe["pruning"] = {**recipe["pruning"], "sparsity": cell.sparsity, "end_step": 2 * times, "update_every": times}
    recipe["training"] = {**recipe["training"], "max_steps": 4 * times, "save_steps": 2 * times}
    if cell.task:
        recipe["tasks"] = {cell.task: recipe["tasks"][cell.task]}
        recipe["pruning"] |= {"decision": "unanimous", "quorum": 1}
    results = run.train(parse_recipe(recipe))
    (ours,) = (
        c
        for c in finished.report["cells"]
        if (c["task"], c["sparsity"], c["seed"]) == (cell.task, cell.sparsity, cell.seed)
    )
    assert ours["metrics"] == results["sparse"] and ours["examples"] == results["examples"]
    assert {**ours["pruned"], "target": cell.sparsity} == results["sparsity"]


def test_both_sides_keep_the_same_number_of_weights(finished):
    for row in finished.report["rows"]:
        size = finished.report["cells"][0]["prunable"]
        assert row["kept"] <= round(row["budget"] * size) + 1 and size == 4096
        if row["model"] == "shared":
            assert row["kept"] == size - round((1 - row["budget"]) * size)
            assert row["sparsities"] == dict.fromkeys(("two", "real"), 1 - row["budget"])
        else:
            assert row["kept"] == sum(size - round(s * size) for s in row["sparsities"].values())
    for cell in finished.report["cells"]:
        assert cell["pruned"]["prunable"] == round(cell["sparsity"] * 4096) / 4096


def test_the_rows_are_those_of_the_cells_and_of_the_best_choice(finished):
    metrics = figures(finished.report)

    def value(task, sparsity, seed):
        (found,) = (
            m["tasks"][task] for c, m in metrics.items() if (c.task, c.sparsity, c.seed) == (task, sparsity, seed)
        )
        return sum(found.values()) / len(found)

    curve = {t: {s: (value(t, s, 1) + value(t, s, 2)) / 2 for s in (0.6, 0.8, 0.9)} for t in ("two", "real")}
    assert {t: {float(s): v for s, v in points.items()} for t, points in finished.report["curve"].items()} == {
        t: pytest.approx(points) for t, points in curve.items()
    }
    rows = {(row["model"], row["budget"]): row for row in finished.report["rows"]}
    assert list(rows) == [(model, budget) for budget in (0.3, 0.5) for model in ("ensemble", "shared")]
    for budget in (0.3, 0.5):
        ensemble, shared = rows["ensemble", budget], rows["shared", budget]
        fitting = [(a, b) for a in curve["two"] for b in curve["real"] if 2 - a - b <= budget + 1e-9]
        best = max(curve["two"][a] + curve["real"][b] for a, b in fitting)
        assert 2 * ensemble["mean"]["average"] == pytest.approx(best)
        by_seed = [
            (value("two", ensemble["sparsities"]["two"], s) + value("real", ensemble["sparsities"]["real"], s)) / 2
            for s in (1, 2)
        ]
        assert ensemble["mean"]["average"] == pytest.approx(sum(by_seed) / 2)
        assert ensemble["spread"]["average"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / math.sqrt(2))
        averages = [metrics[ModelCell(None, float(1 - exact(budget)), seed)]["average"] for seed in (1, 2)]
        assert shared["mean"]["average"] == pytest.approx(sum(averages) / 2)
        assert shared["against_ensemble"] == pytest.approx(
            sum(a - b for a, b in zip(averages, by_seed, strict=True)) / 2
        )
        assert ensemble["seeds"] == shared["seeds"] == [1, 2] and ensemble["against_ensemble"] is None
    assert len({json.dumps(m) for m in metrics.values()}) > 8, "equal metrics would prove nothing"


def test_terminal_and_markdown_show_the_rows(finished, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = snapshot(finished.folder)
    monkeypatch.setattr(
        "hf_disparse.compare.runner.prepare", lambda *_: pytest.fail("a finished comparison loads no data")
    )
    status, out, _ = hf_disparse("compare", finished.folder.with_name("recipe.yaml"), *COMMAND)
    assert status == 0 and {n: f[0] for n, f in snapshot(finished.folder).items()} == {
        n: f[0] for n, f in before.items()
    }
    header, *lines = parsed_table((finished.folder / REPORTS[1]).read_text())
    shown = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    measured = ["two", "real", "average", "against ensemble", "seeds", "times as fast"]
    assert shown == lines and header == ["model", "budget", *measured]
    for line, row in zip(lines, finished.report["rows"], strict=True):
        assert line[0].split()[0] == row["model"] and line[1] == f"{100 * row['budget']:g} %" and line[6] == "2"
        for name, text in zip(("two", "real", "average"), line[2:5], strict=True):
            text, _, sparsity = text.partition(" (")
            value, _, spread = text.partition(" ± ")
            assert float(value) == pytest.approx(row["mean"][name], abs=0.0501)
            assert float(spread) == pytest.approx(row["spread"][name], abs=0.0501)
            if row["model"] == "ensemble" and name != "average":
                assert float(sparsity.removesuffix(" %)")) == pytest.approx(100 * row["sparsities"][name])
            else:
                assert sparsity == ""
        assert line[7] == " / ".join(f"{x:.1f}" for x in row["times_as_fast"].values()) and " / " in line[7]
        assert (line[0], line[5]) == ("ensemble", "") or line[0] == f"shared ({100 - 100 * row['budget']:g} %)"
    assert "on two 8, real 10 held-out examples" in (finished.folder / REPORTS[1]).read_text()


def test_one_dense_model_per_model_and_seed_and_nothing_but_results_is_left(finished):
    dense = {f"dense-{who}-seed{seed}" for who in ("task-two", "task-real", "shared") for seed in (1, 2)}
    cells = {f"cells/{ModelCell(*cell).name}" for cell in CELLS}
    assert finished.trainings == dict.fromkeys(dense | cells, 1)
    folder = finished.folder / "equal-budget"
    assert {p.name for p in finished.folder.iterdir()} == {
        ".lock",
        "data.json",
        "recipe.yaml",
        "equal-budget",
        *REPORTS,
    }
    assert {p.name for p in folder.iterdir()} == {"cells", *dense} and not list(folder.rglob("checkpoint-*"))
    assert {f"cells/{p.stem}" for p in (folder / "cells").iterdir()} == cells


@pytest.fixture
def copied(finished, inputs, tmp_path) -> dict:
    """A recipe whose folder is a copy of the finished comparison."""
    shutil.copytree(finished.folder, tmp_path / "run-compare")
    return {**inputs, "output_dir": str(tmp_path / "run")}


def test_another_budget_trains_shared_models_only_and_another_sparsity_the_curve(copied):
    words = ("--protocol", "equal-budget", "--seeds", "2")
    more = compared(copied, *words, "--sparsities", "0.6,0.8,0.9", "--budgets", "0.4")
    assert more.status == 0 and more.trainings == {"cells/shared-0.6-seed2": 1}
    assert [(row["model"], row["budget"], row["seeds"]) for row in more.report["rows"]] == [
        ("ensemble", 0.4, [2]),
        ("shared", 0.4, [2]),
    ]
    assert {row["spread"]["two"] for row in more.report["rows"]} == {None}
    more = compared(copied, *words, "--sparsities", "0.8,0.7", "--budgets", "0.5")
    assert more.trainings == {f"cells/task-{task}-0.7-seed2": 1 for task in ("two", "real")}


def test_methods_can_be_compared_in_the_same_folder(copied):
    more = hf_disparse(
        "compare", write_recipe(Path(copied["output_dir"]).parent, copied), "--methods=magnitude", "--seeds=1"
    )
    assert more[0] == 0, more[2]
    folder = Path(copied["output_dir"] + "-compare")
    assert (folder / "compare.md").is_file() and (folder / "equal-budget.md").is_file()


# Failing and stopping

FEW = ("--protocol", "equal-budget", "--sparsities", "0.8,0.9", "--budgets", "0.3", "--seeds", "2")


def same_in_the_end(recipe: dict, finished: SimpleNamespace) -> SimpleNamespace:
    done = compared(recipe, *FEW)
    assert done.status == 0 and done.report["failed"] == {}, done.err
    ours, theirs = figures(done.report), figures(finished.report)
    assert len(ours) == 5 and ours == {cell: theirs[cell] for cell in ours}
    return done


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(recipe, finished, monkeypatch):
    decide = granularity.decide_by

    def failing(config, scores, sparsity, *args):
        scores = list(scores)
        if [task for task, _ in scores] == ["two"] and config.sparsity == 0.8:
            raise RuntimeError("no luck\ntoday")
        return decide(config, scores, sparsity, *args)

    with monkeypatch.context() as patch:
        patch.setattr(granularity, "decide_by", failing)
        done = compared(recipe, *FEW)
    name = ModelCell("two", 0.8, 2).name
    assert done.status == 1 and f"failed: {name}: no luck today" in done.err.splitlines()
    assert done.report["failed"] == {name: "no luck today"}
    assert f"{name}: no luck today" in (done.folder / REPORTS[1]).read_text()
    ensemble, _ = done.report["rows"]
    assert ensemble["sparsities"]["two"] == 0.9, "the rest of its curve counts"
    again = same_in_the_end(recipe, finished)
    assert again.trainings == {f"cells/{name}": 1} and "no luck" not in (done.folder / REPORTS[1]).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "step", "done"),
    [("dense-task-real-seed2", 2, 2), ("cells/task-two-0.9-seed2", 3, 1), ("cells/shared-0.7-seed2", 7, 4)],
)
def test_what_was_stopped_goes_on_to_the_same_figures(recipe, finished, place, step, done):
    with stopping(f"/equal-budget/{place}", step, KeyboardInterrupt):
        stopped = compared(recipe, *FEW)
    assert stopped.status == 130 and f"stopped; {done} of 5 cells are done" in stopped.err and stopped.report is None
    again = same_in_the_end(recipe, finished)
    assert again.err.count("resumed") == 1 and f"from {again.folder}/equal-budget/{place}/checkpoint-" in again.err


def test_helpers_are_left_out_on_both_sides(recipe, tmp_path):
    recipe = changed(recipe, "tasks.third", recipe["tasks"]["two"]) | {"helpers": ["third"]}
    done = compared(recipe, *FEW)
    assert done.status == 0, done.err
    assert not [place for place in done.trainings if "third" in place]
    assert all("third" not in cell["examples"]["train"] for cell in done.report["cells"])
    assert without(recipe, "tasks.third")["tasks"].keys() == {"two", "real"}

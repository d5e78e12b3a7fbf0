"""The budget race: an exact knapsack over sparsity curves, equal passes for both sides, and a table that says so."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_disparse import DisparseTrainer, UserError, race, run
from hf_disparse.race import Cell, Race, best_ensemble, exact, recipe_of, tabulate
from hf_disparse.recipes import parse_recipe
from hf_disparse.trainer.methods import saliency
from tests.cli_helpers import changed, hf_disparse, refused, snapshot, without, write_csv, write_inputs, write_recipe
from tests.test_compare import parsed_table

torch.set_num_threads(1)

COMMAND = ("--protocol", "equal-budget", "--sparsities", "0.6,0.8,0.9", "--budgets", "0.3,0.5", "--seeds", "1,2")
SINGLES = [(task, s) for task in ("two", "real") for s in (0.6, 0.8, 0.9)]
CELLS = [(*who, seed) for seed in (1, 2) for who in (*SINGLES, (None, 0.7), (None, 0.5))]
REPORTS = ("equal-budget.json", "equal-budget.md")


# The knapsack

_SPARSITIES = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99])
_CURVES = st.lists(
    st.dictionaries(_SPARSITIES, st.integers(-20, 20).map(float), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(_CURVES, st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.35, 0.5, 0.8, 1.0]))
def test_the_best_ensemble_is_that_of_brute_force(points, budget):
    curve = {f"t{i}": values for i, values in enumerate(points)}
    kept = lambda choice: round(sum(1000 * (1 - s) for s in choice))  # noqa: E731  # all are whole thousandths
    fitting = [c for c in itertools.product(*curve.values()) if kept(c) <= round(1000 * budget)]
    metric = lambda choice: sum(curve[task][s] for task, s in zip(curve, choice, strict=True))  # noqa: E731
    found = best_ensemble(curve, budget)
    if not fitting:
        assert found is None
        return
    assert list(found) == list(curve) and tuple(found.values()) in fitting
    best = max(map(metric, fitting))
    assert metric(found.values()) == best
    assert kept(found.values()) == min(kept(c) for c in fitting if metric(c) == best)


def test_what_fits_to_the_last_weight_fits():
    """In floats 3 (1 - 0.9) is more than 0.3."""
    curve = {task: {0.9: 1.0} for task in "abc"}
    assert best_ensemble(curve, 0.3) == dict.fromkeys("abc", 0.9) and 3 * (1 - 0.9) != 0.3
    assert best_ensemble(curve, 0.2999999) is None
    assert best_ensemble({"a": {0.5: 3.0, 0.9: 1.0}, "b": {0.5: 3.0, 0.9: 2.0}}, 0.6) == {"a": 0.5, "b": 0.9}


# Who races


def checked(recipe: dict, sparsities=(0.8, 0.9), seeds=(1,), budgets=()) -> Race:
    return Race(parse_recipe(recipe), sparsities, seeds, budgets)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A task of two classes, and one of regression whose correlations tell models apart; pruning asks for a quorum of 2."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = write_inputs(folder)
    real = {"data": str(write_csv(folder / "real.csv", [0.1, 0.4, 1.0], rows=40, seed=5)), "columns": "text"}
    real |= {"problem_type": "regression", "validation_fraction": 0.25, "metric": ["pearson", "spearmanr"]}
    recipe["tasks"] = {"two": recipe["tasks"]["two"], "real": real}
    recipe["pruning"] = {"sparsity": 0.9, "decision": "quorum", "quorum": 2, "score_batches": 2}
    recipe["pruning"] |= {"schedule": "cubic", "start_step": 0, "update_every": 1, "end_step": 2}
    return changed(recipe, "training.learning_rate", 1e-2)


@pytest.fixture
def recipe(inputs, tmp_path) -> dict:
    return {**inputs, "output_dir": str(tmp_path / "run")}


def test_the_cells_are_every_tasks_curve_and_a_shared_model_per_budget_seed_by_seed(recipe):
    contest = checked(recipe, (0.6, 0.8, 0.9, 0.6), (1, 2, 1), (0.3, 0.5, 0.3))
    assert [(c.task, c.sparsity, c.seed) for c in contest.cells] == CELLS
    named_shared = changed(recipe, "tasks.shared", recipe["tasks"]["two"])
    cells = checked(named_shared, (0.8, 0.95)).cells
    assert len({cell.name for cell in cells}) == len(cells) == 3 * 2 + 1
    assert len({cell.start for cell in cells}) == 4


def test_a_curve_that_no_budget_of_its_own_can_meet_asks_for_higher_sparsities(recipe):
    with pytest.raises(UserError, match=r"at least 0\.8, .* got sparsities up to 0\.6; add higher sparsities"):
        checked(recipe, (0.5, 0.6))


def test_the_budgets_by_default_are_those_of_the_curve_that_an_ensemble_can_meet(recipe):
    assert checked(recipe, (0.1, 0.5, 0.7, 0.9)).budgets == (0.9, 0.5, 0.3)  # two encoders keep at least 0.2
    assert checked(recipe, (0.8, 0.9)).budgets == (0.2,)  # exactly
    assert {c.sparsity for c in checked(recipe, (0.5, 0.9), budgets=(1.0,)).cells if c.task is None} == {0.0}


def test_a_single_task_model_is_the_recipe_with_that_task_and_the_shared_one_has_its_steps_for_every_task(recipe):
    recipe = changed(recipe, "tasks.third", recipe["tasks"]["two"]) | {"helpers": ["third"], "teachers": {"two": "x"}}
    recipe |= {"recovery": {"max_steps": 6, "warmup_steps": 0.25}}
    recipe["training"] |= {"warmup_steps": 3, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    contest = checked(recipe)
    single, shared = (recipe_of(contest, Cell(task, 0.8, 7)) for task in ("real", None))
    assert [list(r.tasks) for r in (single, shared)] == [["real"], ["two", "real"]]
    assert single.helpers == shared.helpers == () and single.teachers == {} and shared.teachers == {"two": "x"}
    assert single.seed == shared.seed == single.pruning.seed == 7
    assert (single.pruning.decision, single.pruning.quorum) == ("unanimous", 1)
    assert (shared.pruning.decision, shared.pruning.quorum) == ("quorum", 2)
    for times, one in ((1, single), (2, shared)):
        pruning, dense, sparse = one.pruning, *(one.arguments(phase, "x") for phase in ("dense", "sparse"))
        assert (pruning.sparsity, pruning.start_step, pruning.end_step, pruning.update_every) == (
            0.8,
            0,
            2 * times,
            times,
        )
        assert (dense.max_steps, sparse.max_steps) == (4 * times, 6 * times)
        assert (dense.warmup_steps, sparse.warmup_steps, sparse.eval_steps, sparse.save_steps) == (
            *(3 * times, 0.25),
            *(2 * times, 2 * times),
        )
        assert sparse.learning_rate == 1e-2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budgets=0.19"], "--budgets: expected at least 0.2, for that is what 2 encoders at the highest of"),
        (["--budgets=0"], "--budgets: expected numbers in (0, 1], fractions of one encoder"),
        (["--budgets=1.5"], "--budgets: expected numbers in (0, 1], fractions of one encoder"),
        (["--budgets=x"], "--budgets: expected values with commas"),
        (["--sparsities=1"], "--sparsities: expected numbers in (0, 1)"),
        (["--sparsities=0.4"], "--budgets: expected at least 1.2, for that is what 2 encoders"),
        (["--sparsities=0.4,0.49"], "--budgets: expected at least 1.02, for that is what 2 encoders"),
        (["--methods=dense"], "--methods: expected nothing with --protocol equal-budget"),
        (["--criteria=snip"], "--criteria: expected nothing with --protocol equal-budget"),
        (["--protocol=methods", "--budgets=0.5"], "--budgets: expected nothing without --protocol equal-budget"),
        (["--set=pruning.granularity=head"], "pruning.granularity: expected weight, for that is a budget's unit"),
        (["--set=pruning.max_drop=1"], "pruning.max_drop: expected nothing where all have the sparsity"),
        (["--set=training.max_steps=-1"], "training.max_steps: expected a number of steps"),
        (["--set=training.metric_for_best_model=two_accuracy"], "evaluation has no 'two_accuracy'"),
        (
            ["--set=helpers=[two]", "--set=pruning.quorum=1"],
            "tasks: expected at least two with --protocol equal-budget",
        ),
        (["--set=pruning.target_modules=[nothing]"], "matches target_modules"),
        (["--set=pruning.end_step=5"], "the last pruning is at step"),
    ],
)
def test_what_cannot_be_raced_is_refused_before_anything_is_written(recipe, tmp_path, words, said):
    path = write_recipe(tmp_path, recipe)
    before = snapshot(tmp_path)
    given = ("--protocol=equal-budget", "--sparsities=0.9", "--seeds=1", "--budgets=0.2")
    refused("compare", path, *given, *words, names=(said,))
    assert snapshot(tmp_path) == before


# The race itself: 4 steps per task and phase, and 2 updates with 2 batches to score on


def raced(recipe: dict, *words: str) -> SimpleNamespace:
    """`hf-disparse compare`; counts trainings by their folder, and the backward passes torch was asked for in each."""
    folder = Path(recipe["output_dir"] + "-compare")
    trainings, passes, place, train = Counter(), Counter(), [], DisparseTrainer.train

    def training(self, *args, **kwargs):
        place.append(str(Path(self.args.output_dir).relative_to(folder / "equal-budget")))
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
        status, out, err = hf_disparse("compare", write_recipe(folder.parent, recipe), *words)
    report = json.loads((folder / REPORTS[0]).read_text()) if (folder / REPORTS[0]).is_file() else None
    seen = {"trainings": trainings, "passes": passes}
    return SimpleNamespace(status=status, out=out, err=err, report=report, folder=folder, **seen)


def figures(report: dict) -> dict[Cell, dict]:
    return {Cell(c["task"], c["sparsity"], c["seed"]): c["metrics"] for c in report["cells"]}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> SimpleNamespace:
    """A race of two budgets and two seeds, which tests leave as it is."""
    done = raced({**inputs, "output_dir": str(tmp_path_factory.mktemp("finished") / "run")}, *COMMAND)
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
        wanted[f"cells/{Cell(task, sparsity, seed).name}"] = steps
    assert finished.passes == wanted
    total = 2 * (4 + 4 + scoring)
    assert {row["backward_passes"] for row in finished.report["rows"]} == {total}
    assert f"{total} backward passes per ensemble and {total} per shared model" in " ".join(finished.out.split())


@pytest.mark.parametrize("cell", [Cell("real", 0.8, 2), Cell("two", 0.6, 1), Cell(None, 0.7, 2)], ids=lambda c: c.name)
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
        averages = [metrics[Cell(None, float(1 - exact(budget)), seed)]["average"] for seed in (1, 2)]
        assert shared["mean"]["average"] == pytest.approx(sum(averages) / 2)
        assert shared["against_ensemble"] == pytest.approx(
            sum(a - b for a, b in zip(averages, by_seed, strict=True)) / 2
        )
        assert ensemble["seeds"] == shared["seeds"] == [1, 2] and ensemble["against_ensemble"] is None
    assert len({json.dumps(m) for m in metrics.values()}) > 8, "equal metrics would prove nothing"


def test_terminal_and_markdown_show_the_rows(finished, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = snapshot(finished.folder)
    monkeypatch.setattr("hf_disparse.compare.prepare", lambda *_: pytest.fail("a finished race loads no data"))
    status, out, _ = hf_disparse("compare", finished.folder.with_name("recipe.yaml"), *COMMAND)
    assert status == 0 and {n: f[0] for n, f in snapshot(finished.folder).items()} == {
        n: f[0] for n, f in before.items()
    }
    header, *lines = parsed_table((finished.folder / REPORTS[1]).read_text())
    shown = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert shown == lines and header == ["model", "budget", "two", "real", "average", "against ensemble", "seeds"]
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
        assert (line[0], line[5]) == ("ensemble", "") or line[0] == f"shared ({100 - 100 * row['budget']:g} %)"
    assert "on two 8, real 10 held-out examples" in (finished.folder / REPORTS[1]).read_text()


def test_one_dense_model_per_model_and_seed_and_nothing_but_results_is_left(finished):
    dense = {f"dense-{who}-seed{seed}" for who in ("task-two", "task-real", "shared") for seed in (1, 2)}
    cells = {f"cells/{Cell(*cell).name}" for cell in CELLS}
    assert finished.trainings == dict.fromkeys(dense | cells, 1)
    folder = finished.folder / "equal-budget"
    assert {p.name for p in finished.folder.iterdir()} == {"recipe.yaml", "equal-budget", *REPORTS}
    assert {p.name for p in folder.iterdir()} == {"cells", *dense} and not list(folder.rglob("checkpoint-*"))
    assert {f"cells/{p.stem}" for p in (folder / "cells").iterdir()} == cells


@pytest.fixture
def copied(finished, inputs, tmp_path) -> dict:
    """A recipe whose folder is a copy of the finished race."""
    shutil.copytree(finished.folder, tmp_path / "run-compare")
    return {**inputs, "output_dir": str(tmp_path / "run")}


def test_another_budget_trains_shared_models_only_and_another_sparsity_the_curve(copied):
    words = ("--protocol", "equal-budget", "--seeds", "2")
    more = raced(copied, *words, "--sparsities", "0.6,0.8,0.9", "--budgets", "0.4")
    assert more.status == 0 and more.trainings == {"cells/shared-0.6-seed2": 1}
    assert [(row["model"], row["budget"], row["seeds"]) for row in more.report["rows"]] == [
        ("ensemble", 0.4, [2]),
        ("shared", 0.4, [2]),
    ]
    assert {row["spread"]["two"] for row in more.report["rows"]} == {None}
    more = raced(copied, *words, "--sparsities", "0.8,0.7", "--budgets", "0.5")
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
    done = raced(recipe, *FEW)
    assert done.status == 0 and done.report["failed"] == {}, done.err
    ours, theirs = figures(done.report), figures(finished.report)
    assert len(ours) == 5 and ours == {cell: theirs[cell] for cell in ours}
    return done


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(recipe, finished, monkeypatch):
    decide = saliency.decide_by

    def failing(config, scores, sparsity, *args):
        scores = list(scores)
        if [task for task, _ in scores] == ["two"] and config.sparsity == 0.8:
            raise RuntimeError("no luck\ntoday")
        return decide(config, scores, sparsity, *args)

    with monkeypatch.context() as patch:
        patch.setattr(saliency, "decide_by", failing)
        done = raced(recipe, *FEW)
    name = Cell("two", 0.8, 2).name
    assert done.status == 1 and f"failed: {name}: no luck today" in done.err.splitlines()
    assert done.report["failed"] == {name: "no luck today"}
    assert f"{name}: no luck today" in (done.folder / REPORTS[1]).read_text()
    ensemble, _ = done.report["rows"]
    assert ensemble["sparsities"]["two"] == 0.9, "the rest of its curve races"
    again = same_in_the_end(recipe, finished)
    assert again.trainings == {f"cells/{name}": 1} and "no luck" not in (done.folder / REPORTS[1]).read_text()


@pytest.mark.parametrize(
    ("place", "step", "done"),
    [("dense-task-real-seed2", 2, 2), ("cells/task-two-0.9-seed2", 3, 1), ("cells/shared-0.7-seed2", 7, 4)],
)
def test_what_was_stopped_goes_on_to_the_same_figures(recipe, finished, monkeypatch, place, step, done):
    training_step = DisparseTrainer.training_step

    def stopping(trainer, *args):
        if trainer.args.output_dir.endswith(f"/equal-budget/{place}") and trainer.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DisparseTrainer, "training_step", stopping)
        stopped = raced(recipe, *FEW)
    assert stopped.status == 130 and f"stopped; {done} of 5 cells are done" in stopped.err and stopped.report is None
    again = same_in_the_end(recipe, finished)
    assert again.err.count("resumed") == 1 and f"from {again.folder}/equal-budget/{place}/checkpoint-" in again.err


# The table of given results


def given_results(values: dict[tuple, tuple]) -> dict[Cell, dict]:
    """(task, sparsity, seed) -> metrics of the tasks "a", "b" and "wnli", of the one task or of all."""
    results = {}
    for (task, sparsity, seed), numbers in values.items():
        tasks = {t: {"accuracy": v} for t, v in zip([task] if task else ["a", "b", "wnli"], numbers, strict=True)}
        rest = {"seconds": {"x": 2.0}, "backward_passes": 5, "dense_backward_passes": 7, "prunable": 1000}
        results[Cell(task, sparsity, seed)] = {"metrics": {"tasks": tasks, "average": run.average(tasks)}, **rest}
    return results


def contest(seeds=(1,), budgets=(0.6,)) -> SimpleNamespace:
    return SimpleNamespace(tasks=["a", "b", "wnli"], sparsities=(0.6, 0.9), seeds=seeds, budgets=budgets)


GIVEN = {("a", 0.6, 1): (80,), ("a", 0.9, 1): (70,), ("b", 0.6, 1): (90,), ("b", 0.9, 1): (60,)}
GIVEN |= {("wnli", 0.6, 1): (99,), ("wnli", 0.9, 1): (1,), (None, 0.4, 1): (85, 85, 3)}


def test_a_task_that_does_not_count_gets_what_nobody_else_wants():
    """WNLI is not in GLUE's average, so that its 99 are worth nothing."""
    (ensemble, shared), curve = tabulate(contest(), given_results(GIVEN))
    assert ensemble["sparsities"] == {"a": 0.9, "b": 0.6, "wnli": 0.9} and ensemble["kept"] == 100 + 400 + 100
    assert ensemble["mean"] == {"average": 80, "a": 70, "b": 90, "wnli": 1} and curve["wnli"] == {0.6: 99, 0.9: 1}
    assert (ensemble["backward_passes"], ensemble["seconds"]) == (36, 6) and shared["backward_passes"] == 12
    assert shared["mean"]["average"] == 85 and shared["against_ensemble"] == 5 and shared["kept"] == 600


def test_a_seed_that_lacks_a_point_has_no_ensemble_and_the_choice_is_one_for_all_seeds():
    second = {(task, sparsity, 2): v for (task, sparsity, _), v in GIVEN.items()} | {("a", 0.6, 2): (150,)}
    rows, _ = tabulate(contest((1, 2)), given_results(GIVEN | second))
    assert rows[0]["sparsities"]["a"] == 0.6 and rows[0]["seeds"] == [1, 2] and rows[0]["mean"]["a"] == 115
    assert rows[0]["spread"]["a"] == pytest.approx(70 / math.sqrt(2))
    torn = given_results({k: v for k, v in (GIVEN | second).items() if k != ("b", 0.9, 2)})
    rows, _ = tabulate(contest((1, 2)), torn)
    assert [row["seeds"] for row in rows] == [[1], [1, 2]] and rows[1]["against_ensemble"] == 5
    nowhere = given_results({k: v for k, v in GIVEN.items() if k[:2] != ("a", 0.9)})
    (ensemble,), curve = tabulate(contest(budgets=(0.8,)), nowhere)
    assert list(curve["a"]) == [0.6] and ensemble["sparsities"]["a"] == 0.6
    (shared,), _ = tabulate(contest(), given_results({k: v for k, v in GIVEN.items() if k[0] != "b"}))
    assert shared["model"] == "shared" and shared["against_ensemble"] is None
    report = {"rows": [], "cells": [], "failed": {"x": "why"}}
    assert race.markdown(report) == "Failed: x: why\n"


def test_helpers_are_left_out_on_both_sides(recipe, tmp_path):
    recipe = changed(recipe, "tasks.third", recipe["tasks"]["two"]) | {"helpers": ["third"]}
    done = raced(recipe, *FEW)
    assert done.status == 0, done.err
    assert not [place for place in done.trainings if "third" in place]
    assert all("third" not in cell["examples"]["train"] for cell in done.report["cells"])
    assert without(recipe, "tasks.third")["tasks"].keys() == {"two", "real"}

"""Equal budget on paper: an exact knapsack over sparsity curves, which cells there are, and a table of given results."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_disparse import UserError
from hf_disparse.compare.equal_budget import EqualBudget, ModelCell, best_ensemble
from hf_disparse.compare.tables import markdown
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.tasks.averages import average
from tests.helpers.commands import changed, refused, snapshot, write_recipe
from tests.helpers.comparing import CELLS, write_equal_budget

torch.set_num_threads(1)


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


# The cells


def checked(recipe: dict, sparsities=(0.8, 0.9), seeds=(1,), budgets=()) -> EqualBudget:
    return EqualBudget(parse_recipe(recipe), sparsities, seeds, budgets)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_equal_budget(tmp_path_factory.mktemp("inputs"))


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
    recipe |= {"recovery": {"max_steps": 6, "warmup_steps": 0.25, "distillation": 0.5}}
    recipe["training"] |= {"warmup_steps": 3, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    contest = checked(recipe)
    single, shared = (contest.recipe_of(ModelCell(task, 0.8, 7)) for task in ("real", None))
    assert [list(r.tasks) for r in (single, shared)] == [["real"], ["two", "real"]]
    assert single.helpers == shared.helpers == () and single.teachers == {} and shared.teachers == {"two": "x"}
    assert single.seed == shared.seed == single.pruning.seed == 7
    assert (single.pruning.decision, single.pruning.quorum) == ("unanimous", 1)
    assert (shared.pruning.decision, shared.pruning.quorum) == ("quorum", 2)
    for times, one in ((1, single), (2, shared)):
        pruning, dense, sparse = one.pruning, one.dense, one.sparse
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
        (
            ["--budgets=0.19"],
            "--budgets: expected at least 0.2, which 2 encoders keep at the highest of the --sparsities",
        ),
        (["--budgets=0"], "--budgets: expected numbers in (0, 1], fractions of one encoder"),
        (["--budgets=1.5"], "--budgets: expected numbers in (0, 1], fractions of one encoder"),
        (["--budgets=x"], "--budgets: expected values separated by commas"),
        (["--sparsities=1"], "--sparsities: expected numbers in (0, 1)"),
        (["--sparsities=0.4"], "--budgets: expected at least 1.2, which 2 encoders keep"),
        (["--sparsities=0.4,0.49"], "--budgets: expected at least 1.02, which 2 encoders keep"),
        (["--methods=dense"], "--methods: only applies to --protocol methods"),
        (["--criteria=snip"], "--criteria: only applies to --protocol methods"),
        (["--protocol=methods", "--budgets=0.5"], "--budgets: only applies to --protocol equal-budget"),
        (["--set=pruning.granularity=head"], "pruning.granularity: expected weight, the unit of a budget"),
        (["--set=pruning.max_drop=1"], "pruning.max_drop: must not be set in a comparison"),
        (["--set=training.max_steps=-1"], "training.max_steps: expected a number of steps"),
        (
            ["--set=training.metric_for_best_model=two_accuracy"],
            "expected average or loss at equal budget",
        ),
        (
            ["--set=helpers=[two]", "--set=pruning.quorum=1"],
            "tasks: expected at least two for a comparison at equal budget",
        ),
        (["--set=pruning.target_modules=[nothing]"], "matches target_modules"),
        (["--set=pruning.end_step=5"], "the last pruning is at step"),
    ],
)
def test_what_cannot_be_compared_at_equal_budget_is_refused_before_anything_is_written(recipe, tmp_path, words, said):
    path = write_recipe(tmp_path, recipe)
    before = snapshot(tmp_path)
    given = ("--protocol=equal-budget", "--sparsities=0.9", "--seeds=1", "--budgets=0.2")
    refused("compare", path, *given, *words, names=(said,))
    assert snapshot(tmp_path) == before


# The table of given results


def given_results(values: dict[tuple, tuple]) -> dict[ModelCell, dict]:
    """(task, sparsity, seed) -> metrics of the tasks "a", "b" and "wnli", of the one task or of all."""
    results = {}
    for (task, sparsity, seed), numbers in values.items():
        tasks = {t: {"accuracy": v} for t, v in zip([task] if task else ["a", "b", "wnli"], numbers, strict=True)}
        rest = {"seconds": {"x": 2.0}, "backward_passes": 5, "dense_backward_passes": 7, "prunable": 1000}
        results[ModelCell(task, sparsity, seed)] = {"metrics": {"tasks": tasks, "average": average(tasks)}, **rest}
    return results


def contest(seeds=(1,), budgets=(0.6,)) -> SimpleNamespace:
    return SimpleNamespace(tasks=["a", "b", "wnli"], sparsities=(0.6, 0.9), seeds=seeds, budgets=budgets)


GIVEN = {("a", 0.6, 1): (80,), ("a", 0.9, 1): (70,), ("b", 0.6, 1): (90,), ("b", 0.9, 1): (60,)}
GIVEN |= {("wnli", 0.6, 1): (99,), ("wnli", 0.9, 1): (1,), (None, 0.4, 1): (85, 85, 3)}


def test_a_task_that_does_not_count_gets_what_nobody_else_wants():
    """WNLI is not in GLUE's average, so that its 99 are worth nothing."""
    (ensemble, shared), curve = EqualBudget.tabulate(contest(), given_results(GIVEN))
    assert ensemble["sparsities"] == {"a": 0.9, "b": 0.6, "wnli": 0.9} and ensemble["kept"] == 100 + 400 + 100
    assert ensemble["mean"] == {"average": 80, "a": 70, "b": 90, "wnli": 1} and curve["wnli"] == {0.6: 99, 0.9: 1}
    assert (ensemble["backward_passes"], ensemble["seconds"]) == (36, 6) and shared["backward_passes"] == 12
    assert shared["mean"]["average"] == 85 and shared["against_ensemble"] == 5 and shared["kept"] == 600


def test_a_seed_that_lacks_a_point_has_no_ensemble_and_the_choice_is_one_for_all_seeds():
    second = {(task, sparsity, 2): v for (task, sparsity, _), v in GIVEN.items()} | {("a", 0.6, 2): (150,)}
    rows, _ = EqualBudget.tabulate(contest((1, 2)), given_results(GIVEN | second))
    assert rows[0]["sparsities"]["a"] == 0.6 and rows[0]["seeds"] == [1, 2] and rows[0]["mean"]["a"] == 115
    assert rows[0]["spread"]["a"] == pytest.approx(70 / math.sqrt(2))
    torn = given_results({k: v for k, v in (GIVEN | second).items() if k != ("b", 0.9, 2)})
    rows, _ = EqualBudget.tabulate(contest((1, 2)), torn)
    assert [row["seeds"] for row in rows] == [[1], [1, 2]] and rows[1]["against_ensemble"] == 5
    nowhere = given_results({k: v for k, v in GIVEN.items() if k[:2] != ("a", 0.9)})
    (ensemble,), curve = EqualBudget.tabulate(contest(budgets=(0.8,)), nowhere)
    assert list(curve["a"]) == [0.6] and ensemble["sparsities"]["a"] == 0.6
    (shared,), _ = EqualBudget.tabulate(contest(), given_results({k: v for k, v in GIVEN.items() if k[0] != "b"}))
    assert shared["model"] == "shared" and shared["against_ensemble"] is None
    report = {"rows": [], "cells": [], "failed": {"x": "why"}}
    assert markdown(report, EqualBudget) == "Failed: x: why\n"

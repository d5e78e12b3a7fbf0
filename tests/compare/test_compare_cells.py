"""The cells of `hf-disparse compare`: which there are, and that all have the same budget."""

import re
from dataclasses import replace

import pytest
import torch

from hf_disparse import DynamicConfig, PlatonConfig, PruningConfig, UserError
from hf_disparse.compare.by_method import Cell, default_criterion, grid, recipe_of, scoring_batches
from hf_disparse.config.rows import NAMES
from hf_disparse.recipes.recipe import parse_recipe
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, write_recipe
from tests.helpers.comparing import ASKS, OTHERS, compared, write_comparison

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_comparison(tmp_path_factory.mktemp("inputs"))


# The grid


def test_the_grid_goes_seed_by_seed_and_holds_no_cell_twice():
    methods = ["dense", "random", "magnitude", "joint", "unanimous", "joint"]
    cells = grid(methods, ["snip", "fisher", "snip"], [0.5, 0.7, 0.5], [3, 1, 3])
    both = [(method, criterion) for method in ("joint", "unanimous") for criterion in ("snip", "fisher")]
    once = [("random", ""), ("magnitude", ""), *both]
    wanted = []
    for seed in (3, 1):
        wanted += [("dense", "", 0.0, seed), *((*c, 0.5, seed) for c in once), *((*c, 0.7, seed) for c in once)]
    assert [(c.method, c.criterion, c.sparsity, c.seed) for c in cells] == wanted
    assert len({cell.name for cell in cells}) == 2 * (1 + 2 * 6)


def test_close_sparsities_have_files_of_their_own():
    assert len({cell.name for cell in grid(["sum"], ["snip"], [0.7000001, 0.7000002], [1])}) == 2


@pytest.mark.parametrize("method", [*ASKS, *OTHERS])
def test_a_method_asks_for_its_criterion_and_decision(method):
    (cell,) = grid([method], ["fisher"], [0.7], [1])
    expected = {**(ASKS | OTHERS)[method], "keep_scores": False}
    for reconstructs in (False, True):
        asked = cell.pruning({"decision": "quorum", "quorum": 2, "reconstruct": reconstructs})
        if reconstructs and method not in ("dense", "reinitialise") and "method" not in expected:
            expected["reconstruct"] = True
        assert PruningConfig.from_dict(asked) == PruningConfig.from_dict(expected)


def test_every_method_is_tested_and_in_the_help():
    assert set(NAMES) == (ASKS | OTHERS).keys() - {"quorum1", "2:4", "block4x4"}
    status, out, _ = hf_disparse("compare", "--help")
    said = re.sub(r"[\s│]+", " ", out)
    assert status == 0 and "Example: hf-disparse compare " in said
    assert "dense, random, magnitude, joint, sum, max, mean, quorum2 (or another number), unanimous" in said
    assert all(name in said for name in NAMES)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--methods=dense,unanimus", "--methods: unknown method 'unanimus'; did you mean 'unanimous'"),
        ("--methods=quorum0", "--methods: unknown method 'quorum0'"),
        ("--methods=quorum3", "quorum: expected at most the number of tasks, 2, got 3"),
        ("--methods= , ", "--methods: expected values separated by commas"),
        ("--methods=4:2", "granularity: expected N below M in a pattern N:M, got '4:2'"),
        ("--sparsities=", "--sparsities: expected values separated by commas"),
        ("--criteria=", "--criteria: expected values separated by commas"),
        ("--criteria=snipp", "--criteria: unknown criterion 'snipp'; did you mean 'snip'"),
        *((f"--sparsities=0.5,{x}", "--sparsities: expected numbers in (0, 1)") for x in ("0", "1", "-0.5", "nan")),
        ("--sparsities=half", "--sparsities: expected values separated by commas, got 'half'"),
        ("--seeds=1,x", "--seeds: expected values separated by commas, got '1,x'"),
        ("--seeds=-1", "seed: expected a whole number of at least 0 and below 2^32, got -1"),
        ("--set=training.max_steps=-1", "recovery.max_steps: expected a number of steps"),  # as in a recipe of epochs
        pytest.param("--set=pruning.target_modules=[nothing]", "matches target_modules"),
        pytest.param("--set=pruning.start_step=4", "the last pruning is at step 4"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(recipe, tmp_path, word, said):
    path = write_recipe(tmp_path, recipe)
    before = snapshot(tmp_path)
    refused("compare", path, "--methods", "dense,joint", "--seeds", "1", word, names=(said,))
    assert snapshot(tmp_path) == before


# The budget: 4 steps, and 2 batches of each of 2 tasks to score


CUBIC = {"pruning.schedule": "cubic", "pruning.start_step": 0, "pruning.update_every": 2, "pruning.end_step": 4}
ALL = CUBIC | {"pruning.score_batches": 3, "recovery.max_steps": 6, "recovery.distillation": 0.5}
TWO, THREE = ({"training.gradient_accumulation_steps": n} for n in (2, 3))
SEVEN = {"training.gradient_accumulation_steps": 7, "pruning.score_batches": 7}
FINE = CUBIC | {"pruning.end_step": 5, "pruning.update_every": 1, "recovery.max_steps": 6, "pruning.sparsity": 0.01}


@pytest.mark.parametrize(
    ("changes", "trained", "voted"),
    [
        (TWO, 8 * 2 // 2 + 4, 4 * 2 + 2 * 2),
        (ALL | TWO | {"recovery.loss_weighting": "pcgrad"}, 24, 6 * 2 + 2 * 3 * 2),  # updates at steps 2 and 4
        (ALL | TWO | {"helpers": ["real"], "pruning.quorum": 1}, 18, 6 * 2 + 1 * 3 * 2),  # one task has a vote
        (THREE, 5 * 3 + 1, 4 * 3 + 2 * 2),  # an epoch has 16 batches, so its sixth step has 1
        (SEVEN, 7 + 7 + 2 + 7 + 7 + 2, 7 + 7 + 2 + 7 + 2 * 7),  # an epoch has 16 batches, so its third step has 2
        ({"pruning.sparsity": 0.0}, 8, 4 + 2 * 2),
        (FINE, 6 + 5 * 2 * 2, 6 + 4 * 2 * 2),  # the last update prunes no weight more, so it does not score
    ],
)
def test_every_cell_states_the_backward_passes_that_it_had(recipe, changes, trained, voted):
    """They are equal but for what does not make a whole step."""
    for key, value in changes.items():
        recipe = changed(recipe, key, value)
    sparsity = str(changes.get("pruning.sparsity") or 0.6)
    done = compared(recipe, "--methods", "dense,magnitude,sum", "--sparsities", sparsity, "--seeds", "1")
    assert done.status == 0, done.err
    stated = {cell["method"]: cell["backward_passes"] for cell in done.report["cells"]}
    assert stated == {"dense": trained, "magnitude": trained, "sum": voted}
    assert {name.split("-")[0]: passes for name, passes in done.passes.items()} == stated
    least, most = sorted((trained, voted))
    assert f"had {least}{f' to {most}' if least < most else ''} backward passes" in done.out


@pytest.mark.parametrize(
    ("pruning", "steps", "budget"),
    [
        ({"method": "movement"}, 80, 80),
        ({"method": "movement", "target_modules": ["query"]}, 80, 80),
        ({"method": "dynamic", "update_every": 1, "score_batches": 1}, 4, 4 + 2 * 3),  # the first mask and 2 exchanges
        ({"method": "rank", "score_batches": 2}, 4, 4 + 2 * 2),
        ({"granularity": "2:4", "sparsity": 0.5, "criterion": "magnitude", "score_batches": 2}, 4, 4 + 2 * 2),
        ({"granularity": ["head"], "criterion": "agreement", "decision": "joint", "score_batches": 2}, 4, 4 + 2 * 2),
    ],
)
def test_a_recipe_of_any_method_can_be_compared_with_every_method(recipe, pruning, steps, budget):
    """At 50 %, so that a recipe of a pattern can. Dynamic scores once a step at most."""
    whole = parse_recipe({**recipe, "pruning": pruning, "recovery": {"max_steps": steps}})
    for cell in grid([*NAMES, "2:4"], ["snip", default_criterion(whole.pruning)], [0.5], [1]):
        own = recipe_of(whole, cell)
        taken = own.values["recovery"]["max_steps"]
        over = taken + 2 * scoring_batches(own.pruning, taken) - budget
        assert own.pruning.sparsity == cell.sparsity and 0 <= over <= 2 * own.pruning.score_batches, cell.name


def test_a_row_whose_scoring_alone_exceeds_the_budget_is_refused(recipe):
    """32 batches of each of 2 tasks by default, where the recipe's own method takes none."""
    whole = parse_recipe({**recipe, "pruning": {"method": "movement"}, "recovery": {"max_steps": 63}})
    said = r"recovery\.max_steps: scoring alone takes sum-snip-0\.5-seed1 64 backward passes, but the budget is 63"
    with pytest.raises(UserError, match=said):
        recipe_of(whole, Cell("sum", "snip", 0.5, 1))
    assert recipe_of(whole, Cell("magnitude", "", 0.5, 1)).values["recovery"]["max_steps"] == 63


def test_a_row_of_the_recipes_method_has_the_recipes_settings_and_others_have_their_defaults(recipe):
    settings = {"criterion": "snip", "allocation": "global", "drop": "disentangled", "score_batches": 3}
    pruning = {"method": "dynamic", "sparsity": 0.5, "decision": "quorum", "quorum": 2, **settings}
    whole = parse_recipe({**recipe, "pruning": pruning, "recovery": {"max_steps": 40}})
    rows = {
        cell.method: recipe_of(whole, cell).pruning
        for cell in grid(["dynamic", "rigl", "platon"], ["snip"], [0.6], [1])
    }
    own = DynamicConfig(sparsity=0.6, seed=1, **settings)
    assert rows["dynamic"] == own and rows["rigl"] == replace(own, decision="joint")
    assert rows["platon"] == PlatonConfig(sparsity=0.6), "it uses neither seed nor score_batches"
    pruning = {"sparsity": 0.5, "score_batches": 3}
    by_scores = parse_recipe({**recipe, "pruning": pruning, "recovery": {"max_steps": 40}})
    assert recipe_of(by_scores, Cell("dynamic", "", 0.6, 1)).pruning == DynamicConfig(sparsity=0.6, seed=1)


@pytest.mark.slow
def test_every_other_method_prunes_on_the_same_budget(inputs, tmp_path):
    """Two tasks, 4 steps and one scoring of 2 batches: 8 passes. Dynamic's growth batches may not fit to the last one."""
    recipe = {**inputs, "output_dir": str(tmp_path / "run")}
    recipe["recovery"] = {**recipe.get("recovery", {}), "max_steps": 4}
    done = compared(recipe, "--methods", ",".join(OTHERS), "--sparsities", "0.5", "--seeds", "1")
    assert done.status == 0 and not done.report["failed"], done.err
    rows = {row["method"]: row for row in done.report["rows"]}
    assert rows.keys() == OTHERS.keys()
    for cell in done.report["cells"]:
        assert cell["backward_passes"] == pytest.approx(8, abs=1), cell["method"]
        atol = {"rank": 0.12, "flop": 0.12}.get(cell["method"], 0.01)  # a budget of components
        assert cell["pruned"]["prunable"] == pytest.approx(0.5, abs=atol), cell["method"]


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cubic", "end_step": 8, "update_every": 2},
        {"exclude_modules": ["query"]},
        {"target_modules": ["key"]},
        {"reinitialise": True},
    ],
)
def test_rows_without_schedule_or_modules_of_their_own_take_none_of_the_recipes(recipe, settings):
    """A pattern is all there at once, heads and neurons go as a whole, one row starts anew; weights go as the recipe says."""
    pruning = {"sparsity": 0.5, "criterion": "snip", "score_batches": 2, **settings}
    whole = parse_recipe({**recipe, "pruning": pruning, "recovery": {"max_steps": 40}})
    for cell in grid([*NAMES, "2:4"], ["snip"], [0.5], [1]):
        recipe_of(whole, cell)
    pattern, sums = (recipe_of(whole, Cell(name, "snip", 0.5, 1)).pruning for name in ("2:4", "sum"))
    assert pattern.schedule == "one_shot" and pattern.n_of_m == (2, 4)
    assert sums == replace(PruningConfig.from_dict(pruning), decision="sum", seed=1, reinitialise=False)
    assert recipe_of(whole, Cell("reinitialise", "snip", 0.5, 1)).pruning.reinitialise

"""`hf-disparse compare`: which cells there are, that all have the same budget, and what stopping and failing leave."""

import csv
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_disparse import DisparseTrainer, PruningConfig, compare, run
from hf_disparse.cells import METHODS, Cell, grid, recipe_of, scoring_batches
from hf_disparse.recipes import parse_recipe
from hf_disparse.trainer.methods import saliency
from tests.cli_helpers import changed, hf_disparse, refused, snapshot, without, write_csv, write_inputs, write_recipe
from tests.tiny import VOCABULARY

torch.set_num_threads(1)

# What each method asks for, given the criterion fisher; the recipe's own pruning section asks for a quorum of 2.
ASKS = {
    "dense": {"sparsity": 0.0},
    "random": {"sparsity": 0.7, "criterion": "random", "decision": "unanimous", "quorum": 1},
    "magnitude": {"sparsity": 0.7, "criterion": "magnitude", "decision": "unanimous", "quorum": 1},
    "joint": {"sparsity": 0.7, "criterion": "fisher", "decision": "joint", "quorum": 1},
    "unanimous": {"sparsity": 0.7, "criterion": "fisher", "decision": "unanimous", "quorum": 1},
    "quorum2": {"sparsity": 0.7, "criterion": "fisher", "decision": "quorum", "quorum": 2},
    "sum": {"sparsity": 0.7, "criterion": "fisher", "decision": "sum", "quorum": 1},
    "max": {"sparsity": 0.7, "criterion": "fisher", "decision": "max", "quorum": 1},
    "mean": {"sparsity": 0.7, "criterion": "fisher", "decision": "mean_rank", "quorum": 1},
    "quorum1": {"sparsity": 0.7, "criterion": "fisher", "decision": "unanimous", "quorum": 1},
}
_PARTS = {"granularity": ["head", "neuron"]}
OTHERS = {
    "reinitialise": {**ASKS["unanimous"], "reinitialise": True},
    "2:4": {**ASKS["unanimous"], "sparsity": 0.5, "granularity": "2:4"},
    "block4x4": {**ASKS["unanimous"], "granularity": "block4x4"},
    "parts": {**ASKS["unanimous"], **_PARTS},
    "agreement": {**ASKS["joint"], **_PARTS, "criterion": "agreement"},
    "dynamic": {"sparsity": 0.7, "method": "dynamic", "score_batches": 1},
    "rigl": {"sparsity": 0.7, "method": "dynamic", "decision": "joint", "score_batches": 1},
    "movement": {"sparsity": 0.7, "method": "movement"},
    "movement_joint": {"sparsity": 0.7, "method": "movement", "decision": "joint"},
    "movement_soft": {"sparsity": 0.7, "method": "movement", "mode": "soft"},
    "platon": {"sparsity": 0.7, "method": "platon"},
    "platon_joint": {"sparsity": 0.7, "method": "platon", "decision": "joint"},
    "l0": {"sparsity": 0.7, "method": "l0"},
    "rank": {"sparsity": 0.7, "method": "rank", "criterion": "fisher", "decision": "unanimous"},
    "flop": {"sparsity": 0.7, "method": "flop"},
    "group_lasso": {"sparsity": 0.7, "method": "group_lasso"},
}
FIRST, LATER = list(ASKS)[:6], list(ASKS)[6:]
ORDER = ["dense", *(method for method in METHODS if method in FIRST[1:])]  # of a table
COMMAND = ("--methods", ",".join(FIRST), "--seeds", "1,2")
FEW = ("--methods", "dense,joint,magnitude", "--seeds", "2")
FEW_CELLS = ("dense-seed2", "joint-fisher-0.7-seed2", "magnitude-0.7-seed2")
PAGE = ("compare.html", "figures/comparison.png", "figures/comparison.svg")
REPORTS = ("compare.json", "compare.md", *PAGE)


def compared(recipe: dict, *words: str) -> SimpleNamespace:
    """`hf-disparse compare`; counts trainings by their folder, and the backward passes torch was asked for in cells."""
    folder = Path(recipe["output_dir"] + "-compare")
    trainings, passes, place, train = Counter(), Counter(), [], DisparseTrainer.train

    def training(self, *args, **kwargs):
        place.append(str(Path(self.args.output_dir).relative_to(folder)))
        trainings[place[-1]] += 1
        return train(self, *args, **kwargs)

    def counting(function):
        def counted(*args, **kwargs):
            passes[place[-1]] += place[-1].startswith("cells/")
            return function(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DisparseTrainer, "train", training)
        patch.setattr(torch.Tensor, "backward", counting(torch.Tensor.backward))
        patch.setattr(torch.autograd, "grad", counting(torch.autograd.grad))
        status, out, err = hf_disparse("compare", write_recipe(folder.parent, recipe), *words)
    report = json.loads((folder / "compare.json").read_text()) if (folder / "compare.json").is_file() else None
    seen = {"trainings": trainings, "passes": {Path(place).name: number for place, number in passes.items() if number}}
    return SimpleNamespace(status=status, out=out, err=err, report=report, folder=folder, **seen)


def figures(folder: Path) -> dict[str, dict]:
    """Cell -> its metrics, of all that are finished."""
    return {path.stem: json.loads(path.read_text())["metrics"] for path in Path(folder, "cells").glob("*.json")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A task of two classes, and one of regression whose correlations tell models apart; pruning asks for a quorum of 2."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = write_inputs(folder)
    real = {"data": str(write_csv(folder / "real.csv", [0.1, 0.4, 1.0], rows=40, seed=5)), "columns": "text"}
    real |= {"problem_type": "regression", "validation_fraction": 0.25, "metric": ["pearson", "spearmanr"]}
    recipe["tasks"] = {"two": recipe["tasks"]["two"], "real": real}
    recipe["pruning"] |= {"criterion": "fisher", "decision": "quorum", "quorum": 2}
    return changed(recipe, "training.learning_rate", 1e-2)


@pytest.fixture
def recipe(inputs, tmp_path) -> dict:
    return {**inputs, "output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> SimpleNamespace:
    """A comparison of six methods and two seeds, which tests leave as it is."""
    done = compared({**inputs, "output_dir": str(tmp_path_factory.mktemp("finished") / "run")}, *COMMAND)
    assert done.status == 0, done.err
    return done


@pytest.fixture(scope="module")
def extended(finished, inputs, tmp_path_factory) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A copy of it to which other methods were added, and then another seed."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(finished.folder, folder / "run-compare")
    recipe = {**inputs, "output_dir": str(folder / "run")}
    methods = compared(recipe, "--methods", ",".join(["joint", *LATER]), "--seeds", "2")
    seeds = compared(recipe, "--methods", "dense,magnitude", "--seeds", "1,2,3")
    assert methods.status == seeds.status == 0, methods.err + seeds.err
    return methods, seeds


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
    asked = cell.pruning({"decision": "quorum", "quorum": 2})
    assert asked == {**(ASKS | OTHERS)[method], "keep_scores": False}
    PruningConfig.from_dict(asked)  # which refuses a quorum where none is


def test_every_method_is_tested_and_in_the_help():
    assert set(METHODS) == (ASKS | OTHERS).keys() - {"quorum1", "2:4", "block4x4"}
    status, out, _ = hf_disparse("compare", "--help")
    said = re.sub(r"[\s│]+", " ", out)
    assert status == 0 and "Example: hf-disparse compare " in said
    assert "dense, random, magnitude, joint, sum, max, mean, quorum2 (or another number), unanimous" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--methods=dense,unanimus", "--methods: unknown method 'unanimus'; did you mean 'unanimous'"),
        ("--methods=quorum0", "--methods: unknown method 'quorum0'"),
        ("--methods=quorum3", "quorum: expected at most the number of tasks, 2, got 3"),
        ("--methods= , ", "--methods: expected values with commas"),
        ("--criteria=snipp", "--criteria: unknown criterion 'snipp'; did you mean 'snip'"),
        *((f"--sparsities=0.5,{x}", "--sparsities: expected numbers in (0, 1)") for x in ("0", "1", "-0.5", "nan")),
        ("--sparsities=half", "--sparsities: expected values with commas between them, got 'half'"),
        ("--seeds=1,x", "--seeds: expected values with commas between them, got '1,x'"),
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


def test_every_cell_has_the_backward_passes_that_the_report_states(finished):
    assert finished.passes == dict.fromkeys(figures(finished.folder), 4 + 2 * 2) and len(finished.passes) == 12
    assert {row["backward_passes"] for row in finished.report["rows"]} == {8}
    assert "had 8 backward passes" in finished.out


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
    ("pruning", "budget"),
    [
        ({"method": "movement"}, 4),
        ({"method": "dynamic", "update_every": 1, "criterion": "snip"}, 4 + 2 * 3),  # the first mask and 2 exchanges
        ({"method": "rank", "score_batches": 2}, 4 + 2 * 2),
        ({"granularity": "2:4", "sparsity": 0.5, "criterion": "magnitude", "score_batches": 2}, 4 + 2 * 2),
        ({"granularity": ["head"], "criterion": "agreement", "decision": "joint", "score_batches": 2}, 4 + 2 * 2),
    ],
)
def test_a_recipe_of_any_method_can_be_compared_with_every_method(recipe, pruning, budget):
    """At 50 %, so that a recipe of a pattern can. Dynamic scores once a step at most."""
    whole = parse_recipe({**recipe, "pruning": pruning, "recovery": {"max_steps": 4}})
    for cell in grid([*METHODS, "2:4"], ["snip"], [0.5], [1]):
        own = recipe_of(whole, cell)
        steps = own.values["recovery"]["max_steps"]
        over = steps + 2 * scoring_batches(own.pruning, steps) - budget
        assert own.pruning.sparsity == cell.sparsity and 0 <= over <= 2 * own.pruning.score_batches, cell.name


# Results, and their reuse


@pytest.mark.parametrize("method", [method for method in ASKS if method != "quorum1"])
def test_a_cell_is_what_train_makes_of_its_recipe(extended, recipe, method):
    steps = 8 if method in ("dense", "random", "magnitude") else 4
    pruning = {"score_batches": 2, **ASKS[method]}
    results = run.train(parse_recipe(recipe | {"seed": 2, "recovery": {"max_steps": steps}, "pruning": pruning}))
    (path,) = extended[0].folder.glob(f"cells/{method}-*seed2.json")
    cell = json.loads(path.read_text())
    assert cell["metrics"] == results["sparse"] and cell["examples"] == results["examples"]
    assert {**cell["pruned"], "target": ASKS[method]["sparsity"]} == results["sparsity"]


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


def test_the_methods_differ_and_a_quorum_of_one_is_unanimity(extended):
    """Otherwise equal metrics would prove nothing."""
    ours = {name: m for name, m in figures(extended[0].folder).items() if name.endswith("seed2")}
    assert ours.pop("quorum1-fisher-0.7-seed2") == ours["unanimous-fisher-0.7-seed2"]
    assert len({json.dumps(m) for m in ours.values()}) == len(ours) == 9


def test_one_dense_model_per_seed_and_one_training_per_cell(finished):
    """Beside the dense models nothing but results is left, in the default folder."""
    assert finished.trainings == dict.fromkeys(
        ("dense-seed1", "dense-seed2", *(f"cells/{name}" for name in figures(finished.folder))), 1
    )
    assert all(path.suffix == ".json" for path in finished.folder.joinpath("cells").iterdir())
    names = {"recipe.yaml", "cells", "dense-seed1", "dense-seed2", *(name.split("/")[0] for name in REPORTS)}
    assert all((finished.folder / name).is_file() for name in PAGE)
    assert {path.name for path in finished.folder.iterdir()} == names
    assert not list(finished.folder.rglob("checkpoint-*")) and not finished.folder.with_name("run").exists()


def test_the_same_command_again_loads_and_trains_nothing(finished, monkeypatch):
    before = snapshot(finished.folder)
    monkeypatch.setattr(compare, "prepare", lambda *_: pytest.fail("a finished comparison loads no data"))
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = hf_disparse("compare", finished.folder.with_name("recipe.yaml"), *COMMAND)
    after = snapshot(finished.folder)
    assert status == 0 and {n: f[0] for n, f in after.items()} == {n: f[0] for n, f in before.items()}
    assert all(after[name] == before[name] for name in after if name not in REPORTS)
    shown = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert shown == parsed_table((finished.folder / "compare.md").read_text())[1:]


def test_other_methods_and_seeds_add_cells_and_touch_nothing(extended, finished):
    methods, seeds = extended
    assert methods.trainings == {f"cells/{method}-fisher-0.7-seed2": 1 for method in LATER}
    assert seeds.trainings == {"dense-seed3": 1, "cells/dense-seed3": 1, "cells/magnitude-0.7-seed3": 1}
    assert {row["method"] for row in methods.report["rows"]} >= {"joint", *LATER}
    rows = {row["method"]: row["seeds"] for row in seeds.report["rows"]}
    assert rows["dense"] == rows["magnitude"] == [1, 2, 3]
    before, after = snapshot(finished.folder), snapshot(seeds.folder)
    assert all(after[name][0] == file[0] for name, file in before.items() if name not in REPORTS)


def test_other_methods_add_rows_to_the_reports(extended):
    assert {row["method"] for row in extended[0].report["rows"]} == ASKS.keys()


def test_a_folder_of_another_recipe_is_refused(finished):
    before = snapshot(finished.folder)
    words = ("--methods", "sum", "--set", "seed=5", "--set", "pruning.sparsity=0.1")
    refused("compare", finished.folder.with_name("recipe.yaml"), *words, names=("output_dir", "pruning, seed"))
    assert snapshot(finished.folder) == before


# Failing and stopping


def same_in_the_end(recipe: dict, finished: SimpleNamespace) -> SimpleNamespace:
    """The next run of FEW ends in the figures of the undisturbed comparison."""
    done = compared(recipe, *FEW)
    assert done.status == 0 and done.report["failed"] == {}, done.err
    wanted = {name: figures(finished.folder)[name] for name in FEW_CELLS}
    assert figures(done.folder) == wanted
    assert {c["method"]: c["metrics"] for c in done.report["cells"]} == {n.split("-")[0]: m for n, m in wanted.items()}
    return done


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(recipe, finished, monkeypatch):
    decide = saliency.decide_by

    def failing(config, *args):
        if config.decision == "joint":
            raise RuntimeError("no luck\ntoday")
        return decide(config, *args)

    with monkeypatch.context() as patch:
        patch.setattr(saliency, "decide_by", failing)
        done = compared(recipe, *FEW)
    name = FEW_CELLS[1]
    assert done.status == 1 and f"failed: {name}: no luck today" in done.err.splitlines()
    assert done.report["failed"] == {name: "no luck today"}
    assert f"{name}: no luck today" in (done.folder / "compare.md").read_text()
    assert [row["method"] for row in done.report["rows"]] == ["dense", "magnitude"]
    again = same_in_the_end(recipe, finished)
    assert again.trainings == {f"cells/{name}": 1} and "no luck" not in (done.folder / "compare.md").read_text()


@pytest.mark.parametrize(
    ("place", "step", "end", "done", "checkpoint"),
    [
        ("dense-seed2", 2, KeyboardInterrupt, 0, 2),
        ("cells/joint-fisher-0.7-seed2", 3, KeyboardInterrupt, 1, 2),
        ("cells/magnitude-0.7-seed2", 7, SystemExit(137), 2, 6),
    ],
)
def test_what_was_stopped_goes_on_to_the_same_figures(
    recipe, finished, monkeypatch, place, step, end, done, checkpoint
):
    """By Ctrl-C, which says how far it is, and by an exit that nobody hears of, as when a process is killed."""
    training_step = DisparseTrainer.training_step

    def stopping(trainer, *args):
        if trainer.args.output_dir.endswith(f"-compare/{place}") and trainer.state.global_step == step:
            raise end
        return training_step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DisparseTrainer, "training_step", stopping)
        stopped = compared(recipe, *FEW)
    assert stopped.report is None and len(figures(stopped.folder)) == done
    interrupted = stopped.status == 130 and f"stopped; {done} of 3 cells are done" in stopped.err
    assert interrupted if end is KeyboardInterrupt else stopped.status == 137
    again = same_in_the_end(recipe, finished)
    assert not again.trainings.keys() & {f"cells/{name}" for name in FEW_CELLS[:done]}
    assert again.err.count("resumed") == 1 and f"from {again.folder}/{place}/checkpoint-{checkpoint}\n" in again.err


# The table


def given(method: str, sparsity: float, values: dict[int, tuple]) -> dict:
    """Results of cells by seed: accuracy, pearson, spearmanr, average and seconds."""
    results = {}
    for seed, (two, pearson, spearmanr, average, seconds) in values.items():
        tasks = {"two": {"accuracy": two}, "real": {"pearson": pearson, "spearmanr": spearmanr}}
        cell = Cell(method, "snip" if sparsity else "", sparsity, seed)
        metrics = {"tasks": tasks, "average": average}
        results[cell] = {"metrics": metrics, "seconds": {"a": seconds, "b": 1.0}, "backward_passes": 5678}
    return results


DENSE = given("dense", 0.0, {1: (90, 60, 80, 80, 1), 2: (92, 71, 73, 82, 1), 4: (97, 79, 75, 87, 1)})
JOINT = given("joint", 0.75, {1: (80, 60, 60, 70, 2), 2: (80, 60, 80, 75, 4), 3: (90, 90, 90, 90, 9)})


def test_rows_are_mean_sample_deviation_and_the_difference_from_dense_of_the_same_seed():
    dense, joint = compare.tabulate(DENSE | JOINT)
    assert [dense[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["dense", "", 0.0, [1, 2, 4]]
    assert [joint[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["joint", "snip", 0.75, [1, 2, 3]]
    assert dense["mean"] == pytest.approx({"average": 83, "two": 93, "real": (70 + 72 + 77) / 3})
    assert dense["spread"] == pytest.approx(dict.fromkeys(dense["mean"], math.sqrt((3**2 + 1**2 + 4**2) / 2)))
    assert joint["mean"] == pytest.approx({"average": 235 / 3, "two": 250 / 3, "real": 220 / 3})
    assert joint["spread"]["average"] == pytest.approx(math.sqrt((25**2 + 10**2 + 35**2) / 9 / 2))
    assert joint["against_dense"] == pytest.approx(((70 - 80) + (75 - 82)) / 2)  # of the seeds that both have
    assert dense["against_dense"] == 0 and dense["seconds"] == 2 and joint["seconds"] == (3 + 5 + 10) / 3


def test_one_seed_has_no_spread_and_without_dense_there_is_no_difference():
    (row,) = compare.tabulate(dict([*JOINT.items()][:1]))
    assert row["spread"] == dict.fromkeys(("average", "two", "real")) and row["against_dense"] is None
    dense, joint = compare.tabulate(dict([*DENSE.items()][2:]) | JOINT)  # seed 4 against 1, 2, 3
    assert dense["spread"]["two"] is None and joint["spread"]["two"] is not None and joint["against_dense"] is None


def parsed_table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line of dashes."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(set(cell) <= set("-:") for cell in lines[1])
    return [lines[0], *lines[2:]]


def check_table(text: str, rows: list[dict]) -> None:
    """The numbers that Markdown shows are those of the rows, to the digit shown."""
    header, *lines = parsed_table(text)
    assert header == ["method", "sparsity", "two", "real", "average", "against dense", "seeds"]
    for line, row in zip(lines, rows, strict=True):
        assert line[0] == f"{row['method']} {row['criterion']}".strip() and line[6] == str(len(row["seeds"]))
        assert float(line[1].removesuffix("%")) == pytest.approx(100 * row["sparsity"])
        for name, cell in zip(header[2:5], line[2:5], strict=True):
            value, _, spread = cell.partition("±")
            assert float(value) == pytest.approx(row["mean"][name], abs=0.0501)
            assert (float(spread) if spread else None) == pytest.approx(row["spread"][name], abs=0.0501)
        difference = None if row["method"] == "dense" else row["against_dense"]
        assert (float(line[5]) if line[5] else None) == pytest.approx(difference, abs=0.0501)


def test_markdown_parses_back_to_the_rows(finished):
    check_table((finished.folder / "compare.md").read_text(), finished.report["rows"])
    sizes = {"examples": {"validation": {"two": 1234, "real": 8}}}
    rest = {"failed": {"x": "why"}, "cells": [sizes]}
    for results in (DENSE | JOINT, JOINT, dict([*DENSE.items()][:1])):
        rows = compare.tabulate(results)
        text = compare.markdown({"rows": rows, **rest})
        check_table(text, rows)
        assert "x: why" in text and "two 1,234, real 8 held-out" in text and "5,678 backward passes" in text


def test_the_report_has_the_documented_schema_and_its_rows_are_those_of_its_cells(finished):
    report = finished.report
    assert list(report) == ["rows", "cells", "failed", "environment"]
    assert report["failed"] == {} and {"hf_disparse", "torch", "transformers"} <= report["environment"].keys()
    sizes = {"train": {"two": 24, "real": 30}, "validation": {"two": 8, "real": 10}}
    assert all(cell["examples"] == sizes for cell in report["cells"])
    assert [(cell["method"], cell["seed"]) for cell in report["cells"]] == [(m, s) for m in ORDER for s in (1, 2)]
    assert [row["method"] for row in report["rows"]] == ORDER
    keys = ["method", "criterion", "sparsity", "seeds", "mean", "spread", "against_dense", "backward_passes", "seconds"]
    for row, *cells in zip(report["rows"], report["cells"][::2], report["cells"][1::2], strict=True):
        assert list(row) == keys and row["seeds"] == [1, 2] and list(row["mean"]) == ["average", "two", "real"]
        assert row["mean"]["average"] == pytest.approx(sum(cell["metrics"]["average"] for cell in cells) / 2)
        assert row["seconds"] == pytest.approx(sum(sum(cell["seconds"].values()) for cell in cells) / 2)


# Choosing the best model


def test_the_best_model_is_chosen_by_one_half_and_judged_by_the_other(recipe, tmp_path, monkeypatch):
    """The same halves for all seeds, together the held-out file."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 16), ("validation", 13)):
        path = write_csv(data / f"{split}.csv", ["no", "yes"], rows, seed=rows)
    with path.open(newline="") as file:
        held_out = {(2, *map(VOCABULARY.index, row["text"].split()), 3) for row in csv.DictReader(file)}
    task = {"data": str(data), "columns": "text", "labels": ["no", "yes"]}
    recipe = without(changed(recipe, "tasks.two", task), "tasks.real")
    recipe = changed(recipe, "pruning", {"sparsity": 0.7, "score_batches": 2})
    recipe["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "average"}
    recipe["training"] |= {"eval_strategy": "steps", "eval_steps": 2}
    evaluate, seen = DisparseTrainer.evaluate, []

    def evaluating(self, rows=None, *args, **kwargs):
        used = (self.eval_dataset if rows is None else rows)["two"]
        seen.append((rows is None, self.args.seed, frozenset(map(tuple, used["input_ids"]))))
        return evaluate(self, rows, *args, **kwargs)

    monkeypatch.setattr(DisparseTrainer, "evaluate", evaluating)
    done = compared(recipe, "--methods", "dense,unanimous", "--seeds", "1,2")
    assert done.status == 0, done.err
    assert {entry[:2] for entry in seen} == {(True, 1), (False, 1), (True, 2), (False, 2)}
    (chosen_by,), (judged_by,) = ({rows for during, _, rows in seen if during is when} for when in (True, False))
    assert chosen_by | judged_by == held_out and not chosen_by & judged_by
    assert {len(chosen_by), len(judged_by)} == {6, 7} and f"on two {len(judged_by)} held-out" in done.out

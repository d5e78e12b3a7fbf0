"""`hf-disparse compare`: its cells are what `train` makes, what stopping and failing leave, and the table."""

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_disparse import DisparseTrainer
from hf_disparse.compare import by_method
from hf_disparse.compare import runner as compare
from hf_disparse.compare.by_method import Cell
from hf_disparse.compare.tables import markdown, times_as_fast
from hf_disparse.config.rows import NAMES
from hf_disparse.pruning import granularity
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.report import sentences
from hf_disparse.runs import train as run
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, without, write_csv
from tests.helpers.comparing import ASKS, compared, parsed_table, stopping, write_comparison
from tests.helpers.tiny import VOCABULARY

torch.set_num_threads(1)

FIRST, LATER = list(ASKS)[:6], list(ASKS)[6:]
ORDER = ["dense", *(method for method in NAMES if method in FIRST[1:])]  # of a table
COMMAND = ("--methods", ",".join(FIRST), "--seeds", "1,2")
FEW = ("--methods", "dense,joint,magnitude", "--seeds", "2")
FEW_CELLS = ("dense-seed2", "joint-fisher-0.7-seed2", "magnitude-0.7-seed2")
PAGE = ("compare.html", "figures/comparison.png", "figures/comparison.svg")
REPORTS = ("compare.json", "compare.md", *PAGE)


def figures(folder: Path) -> dict[str, dict]:
    """Cell -> its metrics, of all that are finished."""
    return {path.stem: json.loads(path.read_text())["metrics"] for path in Path(folder, "cells").glob("*.json")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return write_comparison(tmp_path_factory.mktemp("inputs"))


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


# The budget: 4 steps, and 2 batches of each of 2 tasks to score


def test_every_cell_has_the_backward_passes_that_the_report_states(finished):
    assert finished.passes == dict.fromkeys(figures(finished.folder), 4 + 2 * 2) and len(finished.passes) == 12
    assert {row["backward_passes"] for row in finished.report["rows"]} == {8}
    assert "had 8 backward passes" in finished.out and "Computed in float32." in finished.out


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
    names = {
        ".lock",
        "data.json",
        "recipe.yaml",
        "cells",
        "dense-seed1",
        "dense-seed2",
        *(name.split("/")[0] for name in REPORTS),
    }
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
    grown = (*REPORTS, "data.json")
    assert all(after[name][0] == file[0] for name, file in before.items() if name not in grown)
    old, new = (json.loads(files["data.json"][0]) for files in (before, after))
    assert old.keys() == {"1", "2"} and new == old | {"3": new["3"]}


def test_other_methods_add_rows_to_the_reports(extended):
    assert {row["method"] for row in extended[0].report["rows"]} == ASKS.keys()


def test_a_folder_of_another_recipe_is_refused(finished):
    before = snapshot(finished.folder)
    words = ("--methods", "sum", "--set", "seed=5", "--set", "pruning.sparsity=0.1")
    refused("compare", finished.folder.with_name("recipe.yaml"), *words, names=("output_dir", "pruning.sparsity, seed"))
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
    decide = granularity.decide_by

    def failing(config, *args):
        if config.decision == "joint":
            raise RuntimeError("no luck\ntoday")
        return decide(config, *args)

    with monkeypatch.context() as patch:
        patch.setattr(granularity, "decide_by", failing)
        done = compared(recipe, *FEW)
    name = FEW_CELLS[1]
    assert done.status == 1 and f"failed: {name}: no luck today" in done.err.splitlines()
    assert done.report["failed"] == {name: "no luck today"}
    assert f"{name}: no luck today" in (done.folder / "compare.md").read_text()
    assert [row["method"] for row in done.report["rows"]] == ["dense", "magnitude"]
    again = same_in_the_end(recipe, finished)
    assert again.trainings == {f"cells/{name}": 1} and "no luck" not in (done.folder / "compare.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "step", "end", "done", "checkpoint"),
    [
        ("dense-seed2", 2, KeyboardInterrupt, 0, 2),
        ("cells/joint-fisher-0.7-seed2", 3, KeyboardInterrupt, 1, 2),
        ("cells/magnitude-0.7-seed2", 7, SystemExit(137), 2, 6),
    ],
)
def test_what_was_stopped_goes_on_to_the_same_figures(recipe, finished, place, step, end, done, checkpoint):
    """By Ctrl-C, which says how far it is, and by an exit that nobody hears of, as when a process is killed."""
    with stopping(f"-compare/{place}", step, end):
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
    dense, joint = by_method.tabulate(DENSE | JOINT)
    assert [dense[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["dense", "", 0.0, [1, 2, 4]]
    assert [joint[k] for k in ("method", "criterion", "sparsity", "seeds")] == ["joint", "snip", 0.75, [1, 2, 3]]
    assert dense["mean"] == pytest.approx({"average": 83, "two": 93, "real": (70 + 72 + 77) / 3})
    assert dense["spread"] == pytest.approx(dict.fromkeys(dense["mean"], math.sqrt((3**2 + 1**2 + 4**2) / 2)))
    assert joint["mean"] == pytest.approx({"average": 235 / 3, "two": 250 / 3, "real": 220 / 3})
    assert joint["spread"]["average"] == pytest.approx(math.sqrt((25**2 + 10**2 + 35**2) / 9 / 2))
    assert joint["against_dense"] == pytest.approx(((70 - 80) + (75 - 82)) / 2)  # of the seeds that both have
    assert "-8.5 points relative to dense" in sentences.comparison_sentence([dense, joint])
    assert dense["against_dense"] == 0 and dense["seconds"] == 2 and joint["seconds"] == (3 + 5 + 10) / 3


def test_one_seed_has_no_spread_and_without_dense_there_is_no_difference():
    (row,) = by_method.tabulate(dict([*JOINT.items()][:1]))
    assert row["spread"] == dict.fromkeys(("average", "two", "real")) and row["against_dense"] is None
    dense, joint = by_method.tabulate(dict([*DENSE.items()][2:]) | JOINT)  # seed 4 against 1, 2, 3
    assert dense["spread"]["two"] is None and joint["spread"]["two"] is not None and joint["against_dense"] is None


def test_times_as_fast_are_formed_from_the_cells_times():
    """All encoders of a model count, against one dense encoder; one that is not sped up runs as it is."""

    def cell(dense: float, **fast: float) -> dict:
        return {"speed": {"milliseconds": {"1": {"dense": dense, **fast}, "32": {"dense": 10 * dense, **fast}}}}

    assert times_as_fast([[cell(12, fast=3)], [cell(12, fast=2)]]) == {"1": 5, "32": 50}
    assert times_as_fast([[cell(12, fast=3), cell(12)]]) == {"1": 12 / 15, "32": 120 / 123}
    assert times_as_fast([[cell(12)], [{}]]) == {"1": 1, "32": 1}  # an earlier version wrote the second cell
    assert times_as_fast([[{}]]) is None


def check_table(text: str, rows: list[dict]) -> None:
    """The numbers that Markdown shows are those of the rows, to the digit shown."""
    header, *lines = parsed_table(text)
    assert header == ["method", "sparsity", "two", "real", "average", "against dense", "seeds", "times as fast"]
    for line, row in zip(lines, rows, strict=True):
        assert line[0] == f"{row['method']} {row['criterion']}".strip() and line[6] == str(len(row["seeds"]))
        assert float(line[1].removesuffix("%")) == pytest.approx(100 * row["sparsity"])
        for name, cell in zip(header[2:5], line[2:5], strict=True):
            value, _, spread = cell.partition("±")
            assert float(value) == pytest.approx(row["mean"][name], abs=0.0501)
            assert (float(spread) if spread else None) == pytest.approx(row["spread"][name], abs=0.0501)
        difference = None if row["method"] == "dense" else row["against_dense"]
        assert (float(line[5]) if line[5] else None) == pytest.approx(difference, abs=0.0501)
        assert line[7] == " / ".join(f"{x:.1f}" for x in (row["times_as_fast"] or {}).values())


def test_markdown_parses_back_to_the_rows(finished):
    check_table((finished.folder / "compare.md").read_text(), finished.report["rows"])
    sizes, others = ({"examples": {"validation": {"two": 1234, "real": n}}} for n in (8, 6))
    rest = {
        "failed": {"x": "why"},
        "cells": [sizes | {"precision": "float32"}, others | {"precision": "bf16"}, sizes],
    }
    for results in (DENSE | JOINT, JOINT, dict([*DENSE.items()][:1])):
        rows = by_method.tabulate(results)
        text = markdown({"rows": rows, **rest}, by_method.ByMethod)
        check_table(text, rows)
        assert "x: why" in text and "two 1,234, real 6 to 8 held-out" in text and "5,678 backward passes" in text
        assert "Computed in bf16 and float32." in text


def test_the_report_has_the_documented_schema_and_its_rows_are_those_of_its_cells(finished):
    report = finished.report
    assert list(report) == ["rows", "cells", "failed", "environment"]
    assert report["failed"] == {} and {"hf_disparse", "torch", "transformers"} <= report["environment"].keys()
    sizes = {"train": {"two": 24, "real": 30}, "validation": {"two": 8, "real": 10}}
    assert all(cell["examples"] == sizes for cell in report["cells"])
    assert [(cell["method"], cell["seed"]) for cell in report["cells"]] == [(m, s) for m in ORDER for s in (1, 2)]
    assert [row["method"] for row in report["rows"]] == ORDER
    keys = ["method", "criterion", "sparsity", "seeds", "mean", "spread", "against_dense", "backward_passes", "seconds"]
    keys.append("times_as_fast")
    for row, *cells in zip(report["rows"], report["cells"][::2], report["cells"][1::2], strict=True):
        assert list(row) == keys and row["seeds"] == [1, 2] and list(row["mean"]) == ["average", "two", "real"]
        assert row["mean"]["average"] == pytest.approx(sum(cell["metrics"]["average"] for cell in cells) / 2)
        assert row["seconds"] == pytest.approx(sum(sum(cell["seconds"].values()) for cell in cells) / 2)
        assert list(row["times_as_fast"]) == ["1", "32"] and all(cell["speed"]["tokens"] == 16 for cell in cells)
    assert "Times as fast: 1 text / 32 texts of 16 tokens" in finished.out


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

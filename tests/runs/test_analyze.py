"""`hf-disparse analyze` and what `train`, `compare` and the Trainer say of agreement, against the pieces they are made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hf_disparse import PruningConfig, apply_masks, decide, score
from hf_disparse.analysis import agreement, footprint, knee, watershed
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.recipes.recipe import read_recipe
from hf_disparse.report.write import missing_libraries
from hf_disparse.runs import train as run
from hf_disparse.tasks.averages import average
from tests.helpers.commands import hf_disparse, refused, snapshot, write_recipe
from tests.helpers.training import multitask_trainer

torch.set_num_threads(1)
STAGES = ["before training", "dense", "sparse"]
ROW = ["layer", "kind", "tasks", "iou", "chance", "beyond_chance", "low", "high"]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run without an analysis and the path of its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, {**inputs, "output_dir": str(folder / "run")})
    status, _, err = hf_disparse("train", path, "--no-analysis")
    assert status == 0, err
    assert not (folder / "run" / "analysis.json").exists()
    return folder / "run", path


@pytest.fixture(scope="module")
def analyzed(finished, tmp_path_factory) -> tuple[dict, str, Path]:
    """What analysis.json of the run holds, what the command printed, and where it wrote."""
    target = tmp_path_factory.mktemp("analysis")
    before = snapshot(finished[0])
    words = ("--sparsities", "0.5,0.9", "--within", "60", "--recover", "2", "--output_dir", target)
    status, out, err = hf_disparse("analyze", finished[0], *words)
    assert status == 0, err
    assert snapshot(finished[0]) == before
    if not missing_libraries():
        page = (target / "report.html").read_text()
        assert page.index("Dense and sparse") < page.index("Speed on a CPU") < page.index("Where tasks agree")
    return json.loads((target / "analysis.json").read_text()), out, target


def scored(finished, stage: str) -> tuple:
    """The model of a stage, its trainer and every task's scores, by the run's own pieces."""
    folder, path = finished
    recipe = read_recipe(path)
    tokenizer, data, _ = run.prepare(recipe)
    model = run.new_model(recipe) if stage == "before training" else run.load_model(folder / stage)
    trainer = run.new_trainer(recipe, "sparse", folder.parent / "scored", model, tokenizer, data)
    weights = prunable_parameters(model)
    stream = score(
        model, trainer.pruner.loaders, "disparse", parameters=weights, num_batches=2, loss_fn=trainer.scoring_loss
    )
    return model, trainer, dict(stream), data["validation"]


# Of a run


def test_an_analysis_has_the_documented_schema(analyzed):
    found = analyzed[0]
    keys = [
        "version",
        "model",
        "tasks",
        "criterion",
        "sparsity",
        "score_batches",
        "seed",
        "stages",
        "curve",
        "footprint",
    ]
    assert list(found) == keys
    assert [found[key] for key in keys[:7]] == [1, "run", ["two", "three"], "disparse", 0.7, 2, 0]
    assert [stage["name"] for stage in found["stages"]] == STAGES
    for stage in found["stages"]:
        assert list(stage) == ["name", "agreement", "watershed", "affinity", "keepers", "parts"]
        assert all(list(row) == ROW for row in stage["agreement"])
        assert [len(row) for row in stage["affinity"]["importance"]] == [2, 2]
        assert stage["affinity"]["gradient_cosine"][0][0] == pytest.approx(1)
        assert all(sum(row["kept_by"]) == pytest.approx(1) and len(row["kept_by"]) == 3 for row in stage["keepers"])
        parts = [(row["layer"], row["granularity"], row["count"]) for row in stage["parts"]]
        assert parts == [(0, "head", 2), (1, "head", 2), (0, "neuron", 32), (1, "neuron", 32)]
        assert set(stage["watershed"]) == {"layer", "low", "high", "share"}


@pytest.mark.parametrize("stage", STAGES[:2])
def test_agreement_is_that_of_the_masks_that_each_task_would_have_alone(finished, analyzed, stage):
    _, _, scores, _ = scored(finished, stage)
    expected = agreement({task: decide({task: by}, 0.7) for task, by in scores.items()})
    found = next(s for s in analyzed[0]["stages"] if s["name"] == stage)["agreement"]
    for mine, theirs in zip(found, expected, strict=True):
        assert {**mine, "low": None, "high": None} == theirs
        assert mine["low"] <= mine["beyond_chance"] <= mine["high"]


def test_a_sparse_stage_is_measured_on_what_is_left(finished, analyzed):
    model, _, scores, _ = scored(finished, "sparse")
    live = {name: weight.detach() != 0 for name, weight in prunable_parameters(model).items()}
    size = sum(int(keep.sum()) for keep in live.values())
    total = sum(keep.numel() for keep in live.values())
    pruned = 1 - (size - round(0.7 * size)) / total
    masks = {task: decide({task: by}, pruned, active=live) for task, by in scores.items()}
    expected = agreement(masks, live)
    found = analyzed[0]["stages"][2]["agreement"]
    assert [row["iou"] for row in found] == pytest.approx([row["iou"] for row in expected])
    assert [row["beyond_chance"] for row in found] == pytest.approx([row["beyond_chance"] for row in expected])


def test_the_curve_is_of_the_dense_model_pruned_by_one_set_of_scores(finished, analyzed):
    points = analyzed[0]["curve"]["points"]
    assert [(p["sparsity"], p["recovered"]) for p in points] == [(s, r) for s in (0, 0.5, 0.9) for r in (False, True)]
    model, trainer, scores, rows = scored(finished, "dense")
    for point in points[::2]:
        apply_masks(model, decide(scores, point["sparsity"]))
        values = trainer.evaluate_tasks(rows)[1]
        assert point["metrics"] == pytest.approx({task: 100 * average({task: m}) for task, m in values.items()})
        assert point["average"] == pytest.approx(100 * average(values))
    assert analyzed[0]["curve"]["within"] == {"points": 60, "sparsity": 0.9}
    recovered = [p["average"] for p in points if p["recovered"]]
    assert analyzed[0]["curve"]["knee"]["average"] == knee([0, 0.5, 0.9], recovered)


def test_the_footprint_is_that_of_the_sparse_model(finished, analyzed):
    assert analyzed[0]["footprint"] == footprint(run.load_model(finished[0]))


def test_the_terminal_shows_what_the_file_holds(analyzed):
    found, out, target = analyzed
    for stage in found["stages"]:
        for row in stage["agreement"]:
            if row["kind"] == "all":
                assert f"{row['beyond_chance']:.2f} ({row['low']:.2f} to {row['high']:.2f})" in out
    for point in found["curve"]["points"]:
        assert f"{100 * point['sparsity']:g} %" in out and f"{point['average']:.1f}" in out
    assert "highest sparsity at which no task loses more than 60 points: 90 %" in out
    assert f"written: {target}/analysis.json" in out


@pytest.mark.slow
def test_an_analysis_of_the_same_seed_has_the_same_bits(finished, analyzed, tmp_path):
    status, _, err = hf_disparse("analyze", finished[0], "--sparsities", "0", "--output_dir", tmp_path)
    assert status == 0, err
    again = json.loads((tmp_path / "analysis.json").read_text())
    assert again["curve"] is None
    assert again["stages"] == analyzed[0]["stages"]


@pytest.mark.slow
def test_a_model_alone_is_one_stage_by_another_recipe(finished, tmp_path):
    folder, path = finished
    for name in ("dense", "sparse"):
        shutil.copytree(folder / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        words = ("--recipe", path, "--sparsities", "0.5", "--set", "pruning.sparsity=0.4")
        status, _, err = hf_disparse("analyze", tmp_path / name, *words)
        assert status == 0, err
        found = json.loads((tmp_path / name / "analysis.json").read_text())
        assert [stage["name"] for stage in found["stages"]] == [name] and found["sparsity"] == 0.4
        assert (found["curve"] is not None) == (name == "dense")
    assert "no cost curve" in err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["nowhere"], ["nowhere", "recipe.yaml", "no folder"]),
        (["{folder}", "--sparsities", "1.5"], ["--sparsities", "1.5"]),
        (["{folder}", "--sparsities", "much"], ["--sparsities", "much"]),
        (["{folder}", "--within", "-1"], ["--within", "-1"]),
        (["{folder}", "--recover", "-1"], ["--recover", "-1"]),
        (["{folder}", "--set", "pruning.sparsity=2"], ["pruning", "sparsity"]),
        (["{folder}/dense"], ["recipe.yaml", "--recipe"]),
    ],
)
def test_what_cannot_be_analyzed_is_refused_in_a_line(finished, words, names):
    refused("analyze", *[word.format(folder=finished[0]) for word in words], names=tuple(names))


# At the end of train and compare


@pytest.mark.slow
def test_training_ends_with_a_short_analysis_and_does_not_repeat_it(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    status, out, err = hf_disparse("train", finished[1], "--output_dir", folder)
    assert status == 0 and "beyond chance" in out, err
    found = json.loads((folder / "analysis.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == STAGES and found["curve"] is None
    before = snapshot(folder)
    assert hf_disparse("train", finished[1], "--output_dir", folder)[0] == 0
    assert snapshot(folder) == before


def test_what_goes_wrong_in_the_analysis_does_not_undo_the_training(finished, tmp_path, monkeypatch):
    from hf_disparse import UserError
    from hf_disparse.runs import analyze

    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))

    def broken(*_, **__):
        raise UserError("model: expected something else")

    monkeypatch.setattr(analyze, "analyze", broken)
    status, out, err = hf_disparse("train", finished[1], "--output_dir", folder)
    assert status == 0 and "dense against sparse" in out
    assert "no analysis: model: expected something else" in err


# During training


def test_every_update_logs_how_much_the_tasks_agree(tmp_path):
    config = PruningConfig(sparsity=0.8, schedule="cubic", start_step=1, end_step=3, update_every=1, score_batches=2)
    trainer = multitask_trainer(tmp_path, config, max_steps=5, logging_strategy="steps", logging_steps=1)
    expected, prune = {}, trainer.pruner.prune

    def also_score(model, step, *args):
        weights = prunable_parameters(model)
        live = {name: weight.detach() != 0 for name, weight in weights.items()}
        scores = score(
            model, trainer.pruner.loaders, "disparse", parameters=weights, num_batches=2, loss_fn=trainer.scoring_loss
        )
        size, total = sum(int(m.sum()) for m in live.values()), sum(m.numel() for m in live.values())
        pruned = 1 - (size - round(0.8 * size)) / total
        masks = {task: decide({task: by}, pruned, active=live) for task, by in scores}
        rows = [row for row in agreement(masks, live) if row["kind"] == "all" and len(row["tasks"]) == 3]
        expected[step + 1] = [row["beyond_chance"] for row in rows]
        prune(model, step, *args)

    trainer.pruner.prune = also_score
    trainer.train()
    logged = {row["step"]: row for row in trainer.state.log_history if "agreement" in row}
    assert sorted(logged) == sorted(expected) == [3, 4]
    for step, curve in expected.items():
        ends = [logged[step]["agreement_first_layer"], logged[step]["agreement_last_layer"]]
        assert ends == pytest.approx([curve[0], curve[-1]], abs=1e-6)
        assert min(curve) - 0.05 <= logged[step]["agreement"] <= max(curve) + 0.05
        assert logged[step].get("watershed") == watershed(curve)


def test_what_tells_no_tasks_apart_logs_no_agreement(tmp_path):
    for changes in ({"criterion": "magnitude"}, {"decision": "joint"}):
        trainer = multitask_trainer(
            tmp_path,
            PruningConfig(sparsity=0.8, score_batches=1, **changes),
            max_steps=2,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer.train()
        assert not any("agreement" in row for row in trainer.state.log_history)

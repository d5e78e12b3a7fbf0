"""The commands: whole tiny runs and what they leave on disk, folders that hold something else, and losses that are not finite."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from hf_disparse import MultitaskModel
from hf_disparse.cli import main as cli
from hf_disparse.recipes.recipe import read_recipe
from hf_disparse.runs import folder as run_folder
from hf_disparse.runs import train as run
from hf_disparse.runs.setup import prepare
from hf_disparse.trainer import last_whole_checkpoint
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, write_recipe

torch.set_num_threads(1)
PROCESS = [sys.executable, "-c", "from hf_disparse.cli.main import main; main()"]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run and the path of its recipe. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, {**inputs, "output_dir": str(folder / "run")})
    status, out, err = hf_disparse("train", path, "--no-analysis")
    assert status == 0, err
    assert "dense against sparse" in out and "70.0 % of the prunable weights" in out
    assert "milliseconds, 32 texts" in out and "Texts of 16 tokens, one core" in out
    return folder / "run", path


@pytest.fixture
def copied(finished, tmp_path) -> tuple[Path, str]:
    return Path(shutil.copytree(finished[0], tmp_path / "moved")), finished[1]


# A run from end to end


def test_results_have_the_documented_schema(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    keys = ["recipe", "sparsity", "dense", "sparse", "majority", "examples", "unlabelled", "bytes", "seconds", "log"]
    assert list(results) == [*keys, "environment", "speed"]
    assert list(results["sparsity"]) == ["target", "prunable", "encoder", "model"]
    for phase in ("dense", "sparse"):
        assert list(results[phase]) == ["tasks", "average"]
        values = results[phase]["tasks"]
        assert {task: list(metrics) for task, metrics in values.items()} == {"two": ["accuracy"], "three": ["accuracy"]}
        assert all(0 <= m["accuracy"] <= 100 for m in values.values())
        assert results[phase]["average"] == pytest.approx(sum(m["accuracy"] for m in values.values()) / 2)
    assert results["examples"] == {"train": {"two": 24, "three": 30}, "validation": {"two": 8, "three": 10}}
    seconds = results["seconds"]
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    assert {"hf_disparse", "torch", "transformers", "python", "device"} <= set(results["environment"])
    speed = results["speed"]
    assert list(speed)[:4] == ["tokens", "threads", "milliseconds", "megabytes"] and speed["tokens"] == 16
    assert list(speed["milliseconds"]) == ["1", "32"]


def test_sparsity_is_exact_by_an_independent_count(finished):
    folder = finished[0]
    results = json.loads((folder / "results.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    prunable = [t for name, t in tensors.items() if name.startswith("encoder.encoder.layer.") and t.dim() == 2]
    total, zeros = sum(t.numel() for t in prunable), sum(int((t == 0).sum()) for t in prunable)
    assert total == 2 * (4 * 16 * 16 + 2 * 16 * 32)  # layers x (four attention projections, two of the FFN)
    assert zeros == round(0.7 * total)
    assert results["sparsity"]["target"] == 0.7
    assert results["sparsity"]["prunable"] == zeros / total
    assert results["bytes"]["sparse"] == (folder / "sparse" / "model.safetensors").stat().st_size


def test_the_folder_loads_by_the_auto_classes(finished):
    folder = finished[0]
    model = AutoModel.from_pretrained(folder)
    assert type(model) is MultitaskModel and list(model.tasks) == ["two", "three"]
    saved, loaded = load_file(folder / "model.safetensors"), model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == [2, 5, 6, 3]
    assert json.loads((folder / "pruning_config.json").read_text())["sparsity"] == 0.7


def test_the_same_command_again_trains_and_writes_nothing(finished, monkeypatch):
    folder, path = finished
    before = snapshot(folder)
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("a finished run loads no data"))
    status, out, _ = hf_disparse("train", path, "--no-analysis")
    assert status == 0 and "70.0 % of the prunable weights" in out
    assert snapshot(folder) == before


def _same_run(folder: Path, original: Path) -> None:
    for name in ("dense/model.safetensors", "sparse/model.safetensors", "model.safetensors"):
        assert (folder / name).read_bytes() == (original / name).read_bytes(), name
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, original))
    for key in ("sparsity", "dense", "sparse", "majority", "bytes"):
        assert mine[key] == theirs[key]


def test_the_same_seed_gives_the_same_bits(finished, tmp_path):
    assert hf_disparse("train", finished[1], "--output_dir", tmp_path / "again", "--no-analysis")[0] == 0
    _same_run(tmp_path / "again", finished[0])


def test_a_run_killed_between_its_phases_goes_on_to_the_same_bits(copied, finished):
    """Also in another folder than it began in."""
    folder, path = copied
    dense = snapshot(folder / "dense")
    shutil.rmtree(folder / "sparse")
    for name in ("results.json", "model.safetensors"):
        (folder / name).unlink()
    assert hf_disparse("train", path, "--output_dir", folder, "--no-analysis")[0] == 0
    assert snapshot(folder / "dense") == dense
    _same_run(folder, finished[0])


def test_a_run_killed_in_a_phase_goes_on_from_its_checkpoint_to_the_same_bits(copied, finished):
    folder, path = copied
    for name in ("results.json", "sparse/phase.json", "sparse/model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "sparse" / "checkpoint-4")
    kept = snapshot(folder / "sparse" / "checkpoint-2")
    assert hf_disparse("train", path, "--output_dir", folder, "--no-analysis")[0] == 0
    assert snapshot(folder / "sparse" / "checkpoint-2") == kept
    _same_run(folder, finished[0])


def test_a_helper_trains_the_dense_model_and_is_gone(recipe, tmp_path):
    """Its head is not published, it has neither a row nor a vote, and its data is for training only."""
    data = shutil.copy(recipe["tasks"]["two"]["data"], tmp_path / "third.csv")
    third = {"data": str(data), "columns": ["text"], "labels": ["no", "yes"]}  # no validation split to be found
    helped = changed(recipe, "tasks.third", third) | {
        "helpers": ["third"],
        "output_dir": str(tmp_path / "helped"),
    }
    status, out, err = hf_disparse("train", write_recipe(tmp_path, helped), "--no-analysis")
    assert status == 0, err
    results = json.loads(Path(helped["output_dir"], "results.json").read_text())
    assert "third" in results["examples"]["train"] and "third" not in out
    for place in (results["dense"]["tasks"], results["sparse"]["tasks"], results["examples"]["validation"]):
        assert list(place) == ["two", "three"]
    model = AutoModel.from_pretrained(helped["output_dir"])
    assert list(model.heads) == list(model.tasks) == ["two", "three"]
    assert "scoring third" not in err and "scoring two" in err
    data.unlink()
    assert hf_disparse("evaluate", helped["output_dir"])[0] == 0


def test_evaluate_prints_the_values_of_the_results_and_leaves_nothing_behind(finished, tmp_path, monkeypatch):
    folder = finished[0]
    before = snapshot(folder)
    monkeypatch.chdir(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    status, out, err = hf_disparse("evaluate", folder, "--json", "--set", "output_dir=elsewhere")
    assert status == 0 and "error" not in err
    found = json.loads(out)
    assert {k: found[k] for k in ("tasks", "average")} == results["sparse"]
    assert found["sparsity"] == {k: v for k, v in results["sparsity"].items() if k != "target"}
    assert found["speed"].keys() == results["speed"].keys()
    assert snapshot(folder) == before and snapshot(tmp_path) == {}


def test_evaluate_as_a_table_and_by_another_metric(finished):
    status, out, _ = hf_disparse("evaluate", finished[0], "--set", "tasks.two.metric=[accuracy, f1]")
    average = json.loads((finished[0] / "results.json").read_text())["sparse"]["tasks"]["two"]["accuracy"]
    assert status == 0 and f"{average:.1f}" in out and "f1" in out
    assert "megabytes in memory" in out


def test_the_results_of_an_earlier_version_have_no_speed(copied):
    folder, path = copied
    results = json.loads((folder / "results.json").read_text())
    del results["speed"]
    (folder / "results.json").write_text(json.dumps(results))
    status, out, err = hf_disparse("train", path, "--output_dir", folder, "--no-analysis")
    assert status == 0, err
    assert "dense against sparse" in out and "milliseconds" not in out


def test_export_writes_what_loads_to_the_same_bits(finished, tmp_path):
    folder = finished[0]
    status, out, _ = hf_disparse("export", folder, "--output_dir", tmp_path / "packed")
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert status == 0 and "12 sparse matrices: 33" in out and f"{size:,} bytes" in out  # 30 % of values, 1 bit of 32
    saved, loaded = load_file(folder / "model.safetensors"), AutoModel.from_pretrained(tmp_path / "packed").state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("w1 w2")["input_ids"] == [2, 5, 6, 3]
    refused("export", folder, "--output_dir", tmp_path / "packed", names=("output_dir", "new or empty"))
    refused("export", tmp_path / "none", "--output_dir", tmp_path / "other", names=("none", "a model on the Hub"))


def test_dry_run_checks_everything_and_writes_nothing(recipe, tmp_path):
    path = write_recipe(tmp_path, recipe)
    before = snapshot(tmp_path)
    status, out, _ = hf_disparse("train", path, "--dry-run")
    assert status == 0 and "prunable weights: 4,096 of" in out and "Nothing was trained" in out
    assert snapshot(tmp_path) == before


def test_one_split_is_prepared_as_beside_the_other(recipe, tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, recipe))
    both = prepare(recipe)[1]
    for split in ("train", "validation"):
        alone = prepare(recipe, splits=(split,))[1]
        assert {name: rows.to_list() for name, rows in alone.pop(split).items()} == {
            name: rows.to_list() for name, rows in both[split].items()
        }
        assert not alone


def test_dry_run_shows_a_helper_which_is_not_evaluated(recipe, tmp_path):
    helped = changed(recipe, "tasks.third", recipe["tasks"]["two"]) | {"helpers": ["third"]}
    status, out, err = hf_disparse("train", write_recipe(tmp_path, helped), "--dry-run")
    assert status == 0, err
    (row,) = [line for line in out.splitlines() if "third" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["third", "24", "none, a helper", "0"]


@pytest.mark.parametrize("name", sorted(typer.main.get_command(cli.app).commands))
def test_help_has_an_example(name):
    status, out, _ = hf_disparse(name, "--help")
    assert status == 0 and f"Example: hf-disparse {name} " in out


def test_an_interrupt_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    status, _, err = hf_disparse("train", write_recipe(tmp_path, recipe), "--no-analysis")
    assert status == 130 and "the same command goes on" in err


# Folders that hold something else, or something broken


def test_a_folder_of_another_run(copied):
    folder, path = copied
    before = snapshot(folder)
    for words in ((), ("--dry-run",)):
        names = ("output_dir", "pruning.sparsity, seed", "--output_dir")
        command = ("train", path, "--output_dir", folder, "--set", "seed=5", "--set", "pruning.sparsity=0.1", *words)
        refused(*command, names=names)
    assert snapshot(folder) == before


@pytest.mark.parametrize(("name", "text"), [("thesis.tex", "dear"), ("recipe.yaml", "[1]"), ("recipe.yaml", "{")])
def test_a_folder_of_other_files(recipe, tmp_path, name, text):
    folder = Path(recipe["output_dir"])
    folder.mkdir()
    (folder / name).write_text(text)
    before = snapshot(folder)
    refused("train", write_recipe(tmp_path, recipe), names=("output_dir", str(folder)))
    assert snapshot(folder) == before


def test_a_file_where_the_folder_or_its_parent_should_be(recipe, tmp_path):
    path = write_recipe(tmp_path, recipe)
    (tmp_path / "file").write_text("dear")
    refused("train", path, "--output_dir", tmp_path / "file", names=("output_dir", "new or empty folder"))
    refused("train", path, "--output_dir", tmp_path / "file" / "run", names=("output_dir", "cannot", "file"))
    assert (tmp_path / "file").read_text() == "dear"


def test_a_folder_that_may_not_be_written_to(recipe, tmp_path, monkeypatch):
    """Simulated: for the superuser, whom many containers run tests as, every folder is writable."""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder, "write_whole", denied)
    path = write_recipe(tmp_path, recipe)
    refused("train", path, names=("output_dir", "cannot write", "Permission denied", "another"))


def test_evaluate_a_truncated_model(copied):
    folder = copied[0]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    before = snapshot(folder)
    refused("evaluate", folder, names=(str(folder), "cannot load"))
    assert snapshot(folder) == before


def test_train_on_from_a_truncated_dense_model_or_result(copied):
    folder, path = copied
    (folder / "results.json").write_text("{")
    refused("train", path, "--output_dir", folder, names=(str(folder / "results.json"), "Delete that file"))
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "sparse")
    (folder / "dense" / "model.safetensors").write_bytes(b"cut")
    names = ("output_dir", str(folder / "dense"), "cannot load")
    refused("train", path, "--output_dir", folder, names=names)


def test_evaluate_what_is_not_there_or_does_not_fit(finished, tmp_path):
    refused("evaluate", tmp_path, names=(str(tmp_path), "recipe.yaml", "--recipe"))
    folder = finished[0]
    three = ("--set", "tasks.two.labels=[never, always, maybe]")
    refused("evaluate", folder, *three, names=("tasks.two.labels", "('no', 'yes')", "maybe"))
    task = "{data: d, columns: c, labels: [x, y]}"
    refused("evaluate", folder, "--set", f"tasks.tow={task}", names=("tasks.tow", "it has two, three"))


# Losses that are not finite


def test_training_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_checkpoint(recipe, tmp_path):
    wild = changed(changed(recipe, "training.learning_rate", 1e30), "training.save_steps", 1)
    names = ("training", "finite", "learning_rate", "step 2")
    refused("train", write_recipe(tmp_path, wild), names=names, after_bars=True)
    folder = Path(recipe["output_dir"])
    assert not (folder / "results.json").exists() and not (folder / "dense" / "phase.json").exists()
    checkpoint = last_whole_checkpoint(folder / "dense")
    assert Path(checkpoint).name == "checkpoint-1"
    model = MultitaskModel.from_pretrained(checkpoint)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def with_label(recipe, tmp_path):
    """Writes a recipe with a regression task `real` one of whose eight labels to train on is the given one."""

    def write(label: float) -> str:
        rows = {"text": ["w1 w2"] * 12, "label": [0.5] * 7 + [label, 0.1, 0.2, 0.3, 0.4]}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "real.parquet")
        task = {"data": str(tmp_path / "real.parquet"), "columns": "text", "problem_type": "regression"}
        parts = {"train_split": "train[:8]", "validation_split": "train[8:]"}
        return write_recipe(tmp_path, changed(recipe, "tasks.real", {**task, **parts}))

    return write


def test_a_label_that_is_nan_is_no_label(with_label):
    path = with_label(math.nan)
    assert hf_disparse("train", path, "--no-analysis")[0] == 0
    results = json.loads(Path(yaml.safe_load(Path(path).read_text())["output_dir"], "results.json").read_text())
    assert results["examples"]["train"]["real"] == 7
    assert math.isfinite(results["sparse"]["tasks"]["real"]["pearson"])


def test_a_label_that_is_infinite_is_never_trained_on(with_label, recipe):
    refused("train", with_label(math.inf), names=("real", "inf"))
    assert not Path(recipe["output_dir"], "results.json").exists()


# As a process of its own


@pytest.mark.slow
def test_a_mistake_as_a_process(recipe, tmp_path):
    path = write_recipe(tmp_path, changed(recipe, "tasks.two.labels", ["no", "maybe"]))
    done = subprocess.run([*PROCESS, "train", path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: tasks.two") and len(done.stderr.splitlines()) <= 3, done.stderr


@pytest.mark.slow
def test_evaluate_as_a_process_prints_json_alone(finished):
    done = subprocess.run([*PROCESS, "evaluate", finished[0], "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"].keys() == {"two", "three"}


@pytest.mark.parametrize("words", [["train"], ["trian", "x"], ["train", "--sett", "x"], ["evaluate", "a", "b"]])
def test_a_wrong_command_line_is_refused_in_as_few_lines(words):
    refused(*words, names=("Try: hf-disparse --help",))


def test_version_is_that_of_the_package():
    from hf_disparse import __version__

    assert hf_disparse("--version")[:2] == (0, f"hf_disparse {__version__}\n")

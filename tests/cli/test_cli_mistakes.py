"""What a user reads whose recipe asks for the impossible, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_disparse.cli.main import with_flags
from tests.helpers.commands import changed, hf_disparse, refused, snapshot, without, write_recipe

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        # a wrong key in every section
        ("modle", {}, ("'modle'", "did you mean 'model'")),
        ("model.encodr", "x", ("model.encodr", "did you mean 'encoder'")),
        ("tasks.two.colums", "x", ("tasks.two.colums", "did you mean 'columns'")),
        ("pruning.sparsty", 0.5, ("pruning.sparsty", "did you mean 'sparsity'")),
        ("training.learning_rte", 1, ("training.learning_rte", "did you mean 'learning_rate'")),
        ("recovery.max_step", 1, ("recovery.max_step", "did you mean 'max_steps'")),
        # wrong types and values
        ("tasks", ["two"], ("tasks", "a mapping", "['two']")),
        ("tasks.two", None, ("tasks.two", "a mapping", "None")),
        ("seed", "x", ("seed", "a whole number", "'x'")),
        ("output_dir", 3, ("output_dir", "a folder", "3")),
        ("model.max_length", "long", ("model.max_length", "a whole number", "'long'")),
        ("tasks.two.labels", [False, True], ("tasks.two.labels", "names", "[False, True]")),
        ("pruning.sparsity", "80%", ("pruning.sparsity", "a number in [0, 1)", "'80%'")),
        ("pruning.criterion", "magnitud", ("pruning.criterion", "did you mean 'magnitude'")),
        ("training.max_steps", "x", ("training.max_steps", "a whole number", "'x'")),
        ("recovery.use_cpu", "x", ("recovery.use_cpu", "true or false", "'x'")),
        # what is not there
        ("model.encoder", "/no/such/encoder", ("model.encoder", "/no/such/encoder", "a Hub id or a folder")),
        ("model.encoder", "package:no_such_package/x", ("no_such_package", "pip install no-such-package")),
        ("tasks.two.data", "/no/such/file.csv", ("tasks.two.data", "/no/such/file.csv")),
        ("tasks.two.data", "/no/such/folder", ("tasks.two.data", "/no/such/folder")),
        ("tasks.two.data", "demo:topics", ("tasks.two.data", "did you mean 'topic'")),
        ("tasks.two.columns", ["txt"], ("tasks.two", "'txt'", "did you mean 'text'")),
        ("tasks.two.label_column", "lable", ("tasks.two", "'lable'", "did you mean 'label'")),
        ("tasks.two.train_split", "trian", ("tasks.two", "'trian'", "did you mean 'train'")),
        ("tasks.two.train_split", "train[:0]", ("tasks.two", "at least one training example")),
        ("tasks.two.labels", ["no", "maybe"], ("tasks.two", "no, maybe", "'label'", "'yes'")),
        # what would end training later
        ("pruning.quorum", 2, ("pruning.quorum", "decision: quorum", "2")),
        ("pruning", {"decision": "quorum", "quorum": 3}, ("pruning.quorum", "number of tasks, 2", "got 3")),
        ("pruning.target_modules", ["nothing"], ("pruning", "target_modules", "nothing", "the names look like")),
        ("pruning.start_step", 4, ("pruning", "step 4", "train longer")),
        ("recovery.max_steps", 0, ("pruning", "training ends at step 0", "train longer")),
        ("training.task_sampling", "robin", ("task_sampling", "'robin'", "round_robin")),
        ("training.report_to", "paper", ("training", "paper")),
        ("training.optim_args", "foo", ("training: Trainer refuses these values",)),
        ("recovery.lr_scheduler_type", "cosine_with_min_lr", ("recovery: Trainer refuses these values", "min_lr")),
        ("recovery.lr_scheduler_kwargs", {"foo": 1}, ("recovery: Trainer refuses these values", "foo")),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(recipe, tmp_path, key, value, names):
    path = write_recipe(tmp_path, changed(recipe, key, value))
    before = snapshot(tmp_path)
    refused("train", path, names=names)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "key", ["model", "tasks", "output_dir", "model.encoder", "tasks.two.data", "tasks.two.columns"]
)
def test_a_missing_key_is_named(recipe, tmp_path, key):
    refused("train", write_recipe(tmp_path, without(recipe, key)), names=(key, "required"))


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        (
            "compare",
            "budgets: at least 0.3; add higher `sparsities`",
            "--budgets: at least 0.3; add higher --sparsities",
        ),
        ("push", "repo_id: expected USER/NAME", "REPO: expected USER/NAME"),
        ("train", "output_dir: give it its own `output_dir`", "output_dir: give it its own --output_dir"),  # a recipe's
        ("train", "pruning.quorum: run `hf-disparse train`", "pruning.quorum: run `hf-disparse train`"),
    ],
)
def test_the_command_names_its_flags_for_arguments(monkeypatch, command, message, shown):
    monkeypatch.setattr(sys, "argv", ["hf-disparse", command])
    assert with_flags(message) == shown


def test_a_file_that_is_no_recipe(recipe, tmp_path):
    refused("train", tmp_path / "nowhere.yaml", names=("nowhere.yaml", "expected a recipe"))
    refused("train", write_recipe(tmp_path, "model: [1"), names=("recipe.yaml", "does not parse"))
    twice = yaml.safe_dump(recipe) + "seed: 1\nseed: 2\n"
    refused("train", write_recipe(tmp_path, twice), names=("recipe.yaml", "the key 'seed' stands twice"))


def test_an_override_that_makes_no_sense(recipe, tmp_path):
    path = write_recipe(tmp_path, recipe)
    refused("train", path, "--set", "pruning.sparsity", names=("--set: ", "'pruning.sparsity'", "section.key=value"))
    refused("train", path, "--set", "tasks.*.data=", names=("tasks.two.data", "None"))


def test_a_schedule_that_epochs_cut_off(recipe, tmp_path):
    """54 examples in batches of 4, in turn: 16 batches an epoch, 8 steps of two batches each."""
    training = {**without(recipe, "training.max_steps")["training"], "gradient_accumulation_steps": 2}
    late = changed(changed(recipe, "training", {**training, "num_train_epochs": 1.5}), "pruning.start_step", 12)
    refused("train", write_recipe(tmp_path, late), names=("pruning", "step 12", "training ends at step 12"))
    fits = write_recipe(tmp_path, changed(late, "pruning.start_step", 11))
    assert hf_disparse("train", fits, "--dry-run")[0] == 0


def test_texts_longer_than_the_encoder_has_positions(recipe, tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text,label\n" + "".join(f"{'w1 ' * 100},{label}\n" for label in ("no", "yes") * 4))
    long = changed(recipe, "tasks.two.data", str(path))
    assert hf_disparse("train", write_recipe(tmp_path, long), "--dry_run")[0] == 0
    long = changed(long, "model.max_length", 65)
    refused("train", write_recipe(tmp_path, long), names=("model.max_length", "64", "65", "'two'", "lower it"))


@pytest.mark.slow
def test_bfloat16_on_a_cpu_without_it_is_one_line_and_float32(recipe, tmp_path):
    path = write_recipe(tmp_path, changed(recipe, "training.bf16", True))
    command = [sys.executable, "-m", "hf_disparse", "train", path, "--no-analysis"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}  # as on a CPU that knows no more
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "bf16" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: training.bf16: this CPU has no instructions"), done.stderr
    results = json.loads(Path(recipe["output_dir"], "results.json").read_text())
    assert "bf16" not in results["recipe"]["arguments"]["training"]

"""`hf-disparse` under torchrun and `accelerate launch`: all processes work, one writes and speaks, the end of one ends all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from hf_disparse.trainer.checkpoints import last_whole_checkpoint
from tests.helpers.commands import changed, write_inputs, write_recipe
from tests.helpers.launching import ROOT, torchrun
from tests.helpers.processes import in_processes, run_commands

TRAIN, EVALUATE, COMPARE, AGAIN, WRONG, ANALYZE = range(6)
ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of a run in two processes, and what each of them said to the commands."""
    folder = tmp_path_factory.mktemp("launched")
    recipe = write_recipe(folder, write_inputs(folder))
    compare = ["compare", recipe, "--methods", "dense,unanimous", "--seeds", "1", "--output_dir", str(folder / "cells")]
    train = ["train", recipe]
    wrong = [*train, "--set", "tasks.two.label_column=nothing", "--output_dir", str(folder / "wrong")]
    evaluate, analyze = ["evaluate", str(folder / "run"), "--json"], ["analyze", str(folder / "run")]
    commands = [train, evaluate, compare, train, wrong, analyze]
    ([first], status), ([second], other) = in_processes(2, run_commands, commands)
    assert status == other == 0
    return folder, first, second


def test_both_processes_end_as_one_does_and_only_the_first_speaks(launched):
    _, first, second = launched
    statuses = [status for status, _, _ in first]
    assert statuses == [status for status, _, _ in second] == [0, 0, 0, 0, 2, 2]
    assert all(out == "" for _, out, _ in second)
    for _, _, err in second[:WRONG]:
        assert "training" not in err and "scoring" not in err and "error" not in err
    assert "dense against sparse" in first[TRAIN][1] and "scoring two" in first[TRAIN][2]
    assert "is finished: nothing is left to train" in first[AGAIN][2]
    assert "written:" in first[COMPARE][1]


def test_the_run_is_whole_and_its_figures_are_those_that_evaluation_finds(launched):
    folder, first, _ = launched
    results = json.loads((folder / "run" / "results.json").read_text())
    assert json.loads(first[EVALUATE][1])["tasks"] == results["sparse"]["tasks"]
    weights = load_file(folder / "run" / "model.safetensors")
    mine = [tensor for name, tensor in weights.items() if ".layer." in name and tensor.ndim == 2]
    size = sum(tensor.numel() for tensor in mine)
    assert sum(int((tensor == 0).sum()) for tensor in mine) == round(0.7 * size)
    assert results["bytes"]["dense"] == (folder / "run" / "dense" / "model.safetensors").stat().st_size
    assert json.loads((folder / "cells" / "compare.json").read_text())["failed"] == {}


def test_a_mistake_is_said_once_and_named_with_its_rank_elsewhere(launched):
    _, first, second = launched
    for said, start in ((first[WRONG][2], "error: tasks.two"), (second[WRONG][2], "error: rank 1: tasks.two")):
        (line,) = [line for line in said.splitlines() if line.startswith("error")]
        assert line.startswith(start)


def test_an_analysis_is_left_to_one_process(launched):
    folder, first, second = launched
    assert f"hf-disparse analyze {folder / 'run'}" in first[TRAIN][2] and "analysis" not in second[TRAIN][2]
    for _, _, err in (first[ANALYZE], second[ANALYZE]):
        assert "analyze: expected one process, without torchrun, got 2" in err
    assert not (folder / "run" / "analysis.json").exists()


def test_a_checkpoint_without_the_random_state_of_a_process_is_not_whole(launched):
    folder, _, _ = launched
    phase = folder / "run" / "sparse"
    assert Path(last_whole_checkpoint(phase)).name == "checkpoint-4"
    state = phase / "checkpoint-4" / "rng_state_1.pth"
    away = state.rename(folder / "away.pth")
    assert Path(last_whole_checkpoint(phase)).name == "checkpoint-2"
    away.rename(state)


@pytest.mark.slow
def test_the_end_of_a_process_ends_all_and_the_same_command_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, changed(write_inputs(tmp_path), "training.max_steps", 40))
    script = tmp_path / "die.py"
    script.write_text(
        "import os, signal, sys\n"
        "from transformers import Trainer\n"
        "from hf_disparse.cli import main as cli\n"
        "real = Trainer.training_step\n"
        "def step(self, *args):\n"
        "    if self.state.global_step == 5 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *args)\n"
        "Trainer.training_step = step\n"
        "cli.main()\n"
    )
    done = torchrun(2, script, "train", recipe, "--no-analysis")
    assert done.returncode != 0 and not (tmp_path / "run" / "results.json").exists()
    assert Path(last_whole_checkpoint(tmp_path / "run" / "dense")).name == "checkpoint-4"
    train = ["train", recipe, "--no-analysis"]
    for command, words in ((train, "resumed from"), ([*train, "--output_dir", str(tmp_path / "whole")], "")):
        ([[(status, _, err)]], _), ([[(other, _, _)]], _) = in_processes(2, run_commands, [command])
        assert (status, other) == (0, 0) and words in err, err[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_accelerate_launches_the_recipe_of_several_gpus(tmp_path):
    """Here on CPUs, as the recipe of the training says: it is what the processes share that counts."""
    recipe = write_recipe(tmp_path, write_inputs(tmp_path))
    config = ROOT / "recipes" / "accelerate" / "multi_gpu.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "hf_disparse", "train", recipe]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dense against sparse") == 1
    assert len(list(tmp_path.glob("run/sparse/checkpoint-4/rng_state_*.pth"))) == 2


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_its_recipes_and_their_headers_name_them(path):
    text, values = path.read_text(), yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.num_processes == values["num_processes"] and config.num_machines == values["num_machines"]
    assert f"--config_file recipes/accelerate/{path.name}" in text and "-m hf_disparse train" in text


def test_deepspeed_is_refused_in_one_line_with_the_alternative(tmp_path, monkeypatch):
    from hf_disparse import DisparseTrainingArguments, UserError

    with pytest.raises(UserError, match=r"deepspeed: not supported, .* start with torchrun or accelerate launch"):
        DisparseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what accelerate launch does
    with pytest.raises(UserError, match="deepspeed: not supported"):
        DisparseTrainingArguments(output_dir=str(tmp_path), use_cpu=True)

"""What tests of comparisons share: the methods, a recipe, the command with its passes counted, and a table read back."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_disparse import DisparseTrainer
from tests.helpers.commands import changed, hf_disparse, write_csv, write_inputs, write_recipe

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
    "dynamic": {"sparsity": 0.7, "method": "dynamic", "score_batches": 4},
    "rigl": {"sparsity": 0.7, "method": "dynamic", "decision": "joint", "score_batches": 4},
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


def compared(recipe: dict, *words: str) -> SimpleNamespace:
    """`hf-disparse compare`; counts trainings by their folder, and the backward passes torch was asked for by cell."""
    done = counted(recipe, *words)
    done.passes = {Path(place).name: n for place, n in done.passes.items() if place.startswith("cells/")}
    return done


def counted(recipe: dict, *words: str, below: str = "", report: str = "compare.json") -> SimpleNamespace:
    """`hf-disparse compare`; counts trainings and backward passes by their folder in `below`."""
    folder = Path(recipe["output_dir"] + "-compare")
    trainings, passes, place, train = Counter(), Counter(), [], DisparseTrainer.train

    def training(self, *args, **kwargs):
        place.append(str(Path(self.args.output_dir).relative_to(folder / below)))
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
    found = json.loads((folder / report).read_text()) if (folder / report).is_file() else None
    seen = {"trainings": trainings, "passes": passes}
    return SimpleNamespace(status=status, out=out, err=err, report=found, folder=folder, **seen)


@contextmanager
def stopping(folder: str, step: int, end: type[BaseException] | BaseException) -> Iterator[None]:
    """Trainings whose folder ends so end at a step, too, by raising `end`."""
    training_step = DisparseTrainer.training_step

    def step_or_end(trainer, *args):
        if trainer.args.output_dir.endswith(folder) and trainer.state.global_step == step:
            raise end
        return training_step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DisparseTrainer, "training_step", step_or_end)
        yield


def write_comparison(folder: Path) -> dict:
    """A task of two classes, and one of regression whose correlations tell models apart; pruning asks for a quorum of 2."""
    recipe = write_inputs(folder)
    real = {"data": str(write_csv(folder / "real.csv", [0.1, 0.4, 1.0], rows=40, seed=5)), "columns": "text"}
    real |= {"problem_type": "regression", "validation_fraction": 0.25, "metric": ["pearson", "spearmanr"]}
    recipe["tasks"] = {"two": recipe["tasks"]["two"], "real": real}
    recipe["pruning"] |= {"criterion": "fisher", "decision": "quorum", "quorum": 2}
    return changed(recipe, "training.learning_rate", 1e-2)


def parsed_table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line of dashes."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(set(cell) <= set("-:") for cell in lines[1])
    return [lines[0], *lines[2:]]


COMMAND = ("--protocol", "equal-budget", "--sparsities", "0.6,0.8,0.9", "--budgets", "0.3,0.5", "--seeds", "1,2")

SINGLES = [(task, s) for task in ("two", "real") for s in (0.6, 0.8, 0.9)]

CELLS = [(*who, seed) for seed in (1, 2) for who in (*SINGLES, (None, 0.7), (None, 0.5))]


def write_equal_budget(folder: Path) -> dict:
    """The tasks of a comparison; pruning asks for a quorum of 2 and goes in two steps."""
    pruning = {"sparsity": 0.9, "decision": "quorum", "quorum": 2, "score_batches": 2}
    pruning |= {"schedule": "cubic", "start_step": 0, "update_every": 1, "end_step": 2}
    return changed(write_comparison(folder), "pruning", pruning)

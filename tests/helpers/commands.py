"""A tiny encoder, CSV tasks and a recipe on disk, and the command line called in this process: importing it anew costs seconds."""

import copy
import csv
import io
import random
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from transformers import BertModel, set_seed

from hf_disparse.cli import main as cli
from hf_disparse.config import UserError
from tests.helpers.tiny import WORDS, tiny_bert_config, tiny_tokenizer

LABELS = {"two": ["no", "yes"], "three": ["a", "b", "c"]}


def write_encoder(folder: Path, **changes) -> Path:
    """A seeded tiny BERT, its configuration changed, with its tokenizer, as `from_pretrained` reads them."""
    set_seed(0)
    config = tiny_bert_config()
    for key, value in changes.items():
        setattr(config, key, value)
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_csv(path: Path, labels: list, rows: int, seed: int) -> Path:
    """`rows` texts of random words; the first word decides the label."""
    draw = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            words = draw.choices(range(len(WORDS)), k=6)
            writer.writerow([" ".join(WORDS[w] for w in words), labels[words[0] % len(labels)]])
    return path


def write_inputs(folder: Path) -> dict:
    """Encoder and data below `folder`, and a recipe of two tasks and four steps that uses them."""
    encoder = write_encoder(folder / "encoder")
    tasks = {}
    for seed, (name, labels) in enumerate(LABELS.items()):
        data = write_csv(folder / f"{name}.csv", labels, rows=32 + 8 * seed, seed=seed)
        tasks[name] = {"data": str(data), "columns": ["text"], "labels": labels, "validation_fraction": 0.25}
    return {
        "model": {"encoder": str(encoder), "max_length": 16},
        "tasks": tasks,
        "pruning": {"sparsity": 0.7, "score_batches": 2},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "task_sampling": "round_robin",
            "save_steps": 2,
            "logging_steps": 2,
        },
        "output_dir": str(folder / "run"),
    }


def changed(recipe: dict, path: str, value) -> dict:
    """A copy of the recipe with the value at `section.key.key` replaced or added."""
    new = copy.deepcopy(recipe)
    place = new
    *sections, last = path.split(".")
    for key in sections:
        place = place.setdefault(key, {})
    place[last] = value
    return new


def without(recipe: dict, path: str) -> dict:
    """A copy of the recipe that lacks `section.key.key`."""
    new = copy.deepcopy(recipe)
    place = new
    *sections, last = path.split(".")
    for key in sections:
        place = place[key]
    del place[last]
    return new


def write_recipe(folder: Path, recipe: dict | str, name: str = "recipe.yaml") -> str:
    """Writes the recipe, a dictionary or raw text, and returns its path."""
    path = folder / name
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """File -> bytes and time of change, of everything below `folder`; a folder counts too."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns if p.is_file() else 0)
        for p in sorted(Path(folder).rglob("*"))
    }


def hf_disparse(*words) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `hf-disparse words...`, called in this process."""
    terminated = signal.getsignal(signal.SIGTERM)
    with (
        patch.object(sys, "argv", ["hf-disparse", *map(str, words)]),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, terminated)
    return status, out.getvalue(), err.getvalue()


def refused(*words, names: tuple[str, ...], after_bars: bool = False) -> None:
    """Asserts that the command ends with status 2 and one to three lines, each of `names` in them."""
    status, _, err = hf_disparse(*words)
    assert status == 2, f"status {status}: {err}"
    if after_bars:  # training had begun
        bars, _, err = err.partition("\nerror: ")
        assert "it/s]" in bars
        err = f"error: {err}"
    assert 1 <= len(err.splitlines()) <= 3 and err.startswith("error: "), err
    for name in names:
        assert name in err, f"{name!r} is missing in: {err}"


VALID = {
    "model": {"encoder": "some/encoder", "max_length": 16},
    "tasks": {
        "two": {"data": "two.csv", "columns": ["text"], "labels": ["bad", "good"], "weight": 2.0},
        "real": {"data": "real.csv", "columns": ["a", "b"], "problem_type": "regression", "options": {"sep": ";"}},
    },
    "pruning": {"sparsity": 0.7, "schedule": "cubic", "end_step": 4, "update_every": 2, "target_modules": ["dense"]},
    "training": {"max_steps": 8, "learning_rate": 2e-5, "use_cpu": True, "lr_scheduler_type": "cosine"},
    "recovery": {"learning_rate": 1e-5},
    "seed": 3,
    "output_dir": "runs/x",
}


def valid_with(section: str, **values) -> dict:
    """VALID, with these values of a section changed or added."""
    return {**VALID, section: {**VALID.get(section, {}), **values}}


def refusal(function, *arguments) -> str:
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)

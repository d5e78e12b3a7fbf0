"""Real tasks, a real encoder: minutes each."""

from pathlib import Path

import pytest
import torch
import yaml

from hf_disparse import PruningConfig, prunable_parameters
from hf_disparse.recipes.recipe import parse_recipe
from hf_disparse.runs import train as run
from tests.helpers.glue import glue_recipe, needs_glue
from tests.helpers.tiny import needs_demo, tiny_model
from tests.helpers.training import multitask_trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@needs_demo
@needs_glue
def test_glue_survives_the_vote_and_not_the_random_control(tmp_path):
    """The same dense model, sparsity and recovery; what differs is which weights go."""
    voted = run.train(parse_recipe(glue_recipe(tmp_path / "voted")))
    (tmp_path / "random").mkdir()
    values = glue_recipe(tmp_path / "random", criterion="random")
    (tmp_path / "random" / "dense").symlink_to(tmp_path / "voted" / "dense")
    (tmp_path / "random" / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    random = run.train(parse_recipe(values))
    assert random["dense"] == voted["dense"]
    assert voted["dense"]["average"] > 55, "the dense model has learnt too little to show anything"
    assert voted["sparse"]["average"] > random["sparse"]["average"] + 15
    assert voted["sparse"]["average"] > voted["dense"]["average"] - 8
    for results in (voted, random):
        assert results["sparsity"]["prunable"] == pytest.approx(0.8, abs=1e-6)


@pytest.mark.slow
@needs_demo
def test_the_quickstart_recipe_checks_out():
    values = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    values["training"]["learning_rate"] = 2e-4  # PyYAML's own loader reads 2e-4 as text
    plan = run.plan(parse_recipe(values | {"output_dir": "does-not-exist"}))
    assert list(plan["examples"]["train"]) == ["topic", "headline", "sentiment"]
    assert plan["prunable"] == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert not any(plan["unlabelled"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_masks_hold_on_a_gpu(tmp_path, precision):
    config = PruningConfig(sparsity=0.7, schedule="cubic", end_step=6, update_every=2, score_batches=2)
    trainer = multitask_trainer(tmp_path, config, use_cpu=False, model=tiny_model(), **precision)
    trainer.train()
    parameters = prunable_parameters(trainer.model)
    assert next(iter(parameters.values())).is_cuda
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    assert zeros == round(0.7 * sum(p.numel() for p in parameters.values()))

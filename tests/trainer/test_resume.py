"""A run that dies resumes bit for bit."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_disparse import (
    PruningCallback,
    PruningConfig,
    UserError,
    last_whole_checkpoint,
    load_masks,
    prunable_parameters,
)
from hf_disparse.pruning.masks import MASKS_NAME
from hf_disparse.trainer.checkpoints import SEAL_NAME, STATE_NAME
from tests.helpers.processes import in_processes, train_as_rank
from tests.helpers.resuming import CUBIC, STEPS, DieAt, Died, killed_and_resumed
from tests.helpers.tiny import tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, assert_same, multitask_trainer, plain_model, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), CUBIC, **STEPS)
    trainer.train()
    return weights(trainer.model), trainer.pruner.masks, trainer.evaluate()


# 4 and 8 prune at that step; 7, 10 resume across a pruning step; 14 and 19 are in the second epoch.
@pytest.mark.parametrize("step", [4, 7, 8, 10, 12, 14, 19])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    trainer = killed_and_resumed(tmp_path, CUBIC, step, **STEPS)
    expected, masks, metrics = undisturbed
    assert_same(expected, weights(trainer.model))
    assert_same(masks, trainer.pruner.masks)
    ours = trainer.evaluate()
    measured = [key for key in metrics if key.endswith(("loss", "accuracy", "pearson", "average"))]
    assert len(measured) == 8
    assert {key: ours[key] for key in measured} == {key: metrics[key] for key in measured}


@pytest.mark.parametrize("changes", [{}, {"loss_weighting": "pcgrad"}])
def test_a_run_that_dies_once_all_steps_are_done_has_none_left_to_take(tmp_path, changes):
    changes = STEPS | {"max_steps": 6, "lr_scheduler_type": "constant"} | changes
    config = PruningConfig(sparsity=0.5, score_batches=2)
    whole = multitask_trainer(tmp_path, config, **changes)
    whole.train()
    again = multitask_trainer(tmp_path, config, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(weights(whole.model), weights(again.model))
    assert (again.state.global_step, again.backward_passes) == (6, whole.backward_passes)
    assert again.seconds > json.loads((tmp_path / "checkpoint-6" / STATE_NAME).read_text())["seconds"] > 0


def test_a_checkpoint_holds_the_masks_at_one_bit_a_weight(tmp_path):
    trainer = multitask_trainer(tmp_path, CUBIC, **STEPS | {"max_steps": 18})
    trainer.train()
    masks = load_masks(tmp_path / "checkpoint-18" / MASKS_NAME)
    assert_same({n: m.cpu() for n, m in trainer.pruner.masks.items()}, masks)
    assert not (tmp_path / "checkpoint-3" / MASKS_NAME).exists(), "nothing was pruned by then"


def flip(path: Path) -> None:
    """One bit in the middle, which no reader of that format notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def nine_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nine")
    config = PruningConfig(sparsity=0.5, criterion="magnitude")
    multitask_trainer(folder, config, **STEPS | {"max_steps": 9}).train()
    return folder


TEARS = {
    "no state": lambda p: (p / "trainer_state.json").unlink(),
    "half a state": lambda p: os.truncate(p / "trainer_state.json", 300),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "no optimizer": lambda p: (p / "optimizer.pt").unlink(),
    "no random state": lambda p: (p / "rng_state.pth").unlink(),
    "half of the weights": lambda p: os.truncate(p / "model.safetensors", 5000),
    "half of the optimizer": lambda p: os.truncate(p / "optimizer.pt", 5000),
    "half of the masks": lambda p: os.truncate(p / MASKS_NAME, 100),
}
SEALED_TEARS = {
    "no masks": lambda p: (p / MASKS_NAME).unlink(),
    "no state of ours": lambda p: (p / "disparse_state.json").unlink(),
    "other weights": lambda p: flip(p / "model.safetensors"),
    "another optimizer": lambda p: flip(p / "optimizer.pt"),
    "zeros, of a machine that lost power": lambda p: (p / "optimizer.pt").write_bytes(
        bytes((p / "optimizer.pt").stat().st_size)
    ),
    "no seal that parses": lambda p: (p / SEAL_NAME).write_text("["),
    "another's seal": lambda p: (p / SEAL_NAME).write_text("[1]"),
}


@pytest.mark.parametrize("tear", [*TEARS, *SEALED_TEARS])
def test_a_torn_checkpoint_is_passed_over(tmp_path, nine_steps, tear):
    folder = Path(shutil.copytree(nine_steps, tmp_path / "run"))
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-9")
    (TEARS | SEALED_TEARS)[tear](folder / "checkpoint-9")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-6")
    with pytest.raises(UserError, match=r"checkpoint-9 is not whole: .*; True takes the last whole checkpoint"):
        multitask_trainer(folder, **STEPS).train(resume_from_checkpoint=str(folder / "checkpoint-9"))


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_of_another_trainer_is_passed_over(tmp_path, nine_steps, tear):
    """It has no seal, and what is in the files shows."""
    folder = Path(shutil.copytree(nine_steps, tmp_path / "run"))
    (folder / "checkpoint-9" / SEAL_NAME).unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-9")
    TEARS[tear](folder / "checkpoint-9")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-6")


def test_a_checkpoint_that_is_written_anew_has_nothing_of_the_old_one(tmp_path):
    config = PruningConfig(sparsity=0.5, criterion="magnitude")
    multitask_trainer(tmp_path, config, **STEPS | {"max_steps": 6}).train()
    (tmp_path / "checkpoint-3").rename(tmp_path / "kept")
    multitask_trainer(tmp_path, **STEPS | {"max_steps": 3}).train()
    assert (tmp_path / "kept" / MASKS_NAME).is_file()
    assert not (tmp_path / "checkpoint-3" / MASKS_NAME).exists()
    multitask_trainer(tmp_path, **STEPS | {"max_steps": 6}).train(str(tmp_path / "checkpoint-3"))
    assert not (tmp_path / "checkpoint-6" / MASKS_NAME).exists(), "the masks of the first training"


def test_a_resume_at_the_end_leaves_the_checkpoint_alone(tmp_path, nine_steps):
    """It may be the only whole one; written again, it would be none for a while."""
    folder = Path(shutil.copytree(nine_steps, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoint-9").iterdir()}
    config = PruningConfig(sparsity=0.5, criterion="magnitude")
    multitask_trainer(folder, config, **STEPS | {"max_steps": 9}).train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoint-9").iterdir()} == before


def test_masks_that_are_not_in_the_checkpoint_are_found_in_the_zeros(tmp_path, undisturbed):
    with pytest.raises(Died):
        multitask_trainer(tmp_path, CUBIC, callbacks=[DieAt(14)], **STEPS).train()
    for name in (MASKS_NAME, SEAL_NAME):  # another Trainer writes neither
        (tmp_path / "checkpoint-12" / name).unlink()
    trainer = multitask_trainer(tmp_path, CUBIC, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert_same(undisturbed[0], weights(trainer.model))


def test_a_dense_checkpoint_is_not_taken_for_a_pruned_one(tmp_path):
    multitask_trainer(tmp_path, **STEPS | {"max_steps": 12}).train()
    with pytest.raises(UserError, match=r"should be pruned to 0\.\d+, but only 0 of 4096 weights are pruned"):
        multitask_trainer(tmp_path, CUBIC, **STEPS).train(resume_from_checkpoint=True)


def foreign_trainer(folder, config, *callbacks, **changes) -> Trainer:
    """Another Trainer, which prunes by the callback."""
    rows = tokenized_rows(BINARY, 40)
    batches = [{"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]])} for r in rows]
    return Trainer(
        plain_model(),
        arguments(folder, save_strategy="steps", **changes),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[PruningCallback(config, {"only": batches}), *callbacks],
    )


def assert_pruned_to(sparsity: float, model) -> None:
    parameters = prunable_parameters(model)
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    assert zeros == round(sparsity * sum(p.numel() for p in parameters.values()))


def test_a_foreign_trainer_resumes_with_its_zeros(tmp_path):
    config = PruningConfig(sparsity=0.75, score_batches=5, start_step=1)
    with pytest.raises(Died):
        foreign_trainer(tmp_path, config, DieAt(6), save_steps=4).train()
    again = foreign_trainer(tmp_path, config, save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert_pruned_to(0.75, again.model)


def test_nothing_to_resume_from_says_so(tmp_path):
    assert last_whole_checkpoint(tmp_path / "absent") is None
    with pytest.raises(UserError, match="there is no whole checkpoint in"):
        multitask_trainer(tmp_path, **STEPS).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_processes_agree_on_masks_and_resume_in_the_second_epoch(tmp_path):
    """An epoch has 6 steps here, so that step 19 is in the fourth."""

    def run(name: str, deaths: dict[int, int]):
        return in_processes(2, train_as_rank, str(tmp_path / name), deaths)

    whole = run("whole", {})
    assert [status for _, status in run("killed", {0: 19, 1: 19})] == [-signal.SIGKILL] * 2
    assert Path(last_whole_checkpoint(tmp_path / "killed")).name == "checkpoint-18"
    ends = [end for reports, _ in (*whole, *run("killed", {})) for end in reports]
    assert len(ends) == 4
    for _, *tensors in ends[1:]:
        for mine, first in zip(tensors, ends[0][1:], strict=True):
            assert list(mine) == list(first)
            assert all(np.array_equal(array, first[name]) for name, array in mine.items())


@pytest.mark.parametrize(
    "config",
    [
        replace(CUBIC, start_step=4, update_every=1, reconstruct=True),
        PruningConfig(sparsity=0.5, granularity="layer", start_step=5, score_batches=2),
    ],
)
def test_the_same_trainer_forgets_what_its_checkpoint_does_not_know(tmp_path, config):
    """As in a notebook: it died at step 7, after updates, and resumes from step 3, before the first one."""
    whole = multitask_trainer(tmp_path / "whole", config, **STEPS)
    whole.train()
    death = DieAt(7)
    trainer = multitask_trainer(tmp_path / "died", config, callbacks=[death], **STEPS)
    with pytest.raises(Died):
        trainer.train()
    shutil.rmtree(tmp_path / "died" / "checkpoint-6")
    trainer.remove_callback(death)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(whole.model), weights(trainer.model))
    assert_same(whole.pruner.masks, trainer.pruner.masks)
    assert trainer.backward_passes == whole.backward_passes
    assert trainer.model.config.skipped_layers == whole.model.config.skipped_layers


def test_the_best_model_of_a_foreign_trainer_is_as_sparse_as_asked(tmp_path):
    config = replace(CUBIC, sparsity=0.9, start_step=1, end_step=7, update_every=1, score_batches=5)
    best = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer = foreign_trainer(tmp_path, config, save_steps=2, learning_rate=0.05, **best)
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert min(losses, key=losses.get) < 7, "else this would show nothing"
    assert trainer.state.best_global_step == 8
    assert_pruned_to(0.9, trainer.model)

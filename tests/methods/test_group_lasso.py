"""Group lasso: the proximal step against its definition, exact group sparsity in the trainer, resume, compaction."""

import copy

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import (
    DisparseTrainer,
    MultitaskModel,
    PruningConfig,
    UserError,
    compact,
    find_masks,
    prunable_parameters,
)
from hf_disparse.config import GroupLassoConfig
from hf_disparse.export.card import write_card
from hf_disparse.methods.group_lasso import group_sizes, penalty_in_time, rms, scale_groups, shrinkage
from hf_disparse.model.prunable import prunable_sites
from hf_disparse.pruning.parts import Site, channels, sum_by_part
from tests.helpers.resuming import killed_and_resumed, slow
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, assert_same, multitask_trainer, weights

# Two groups: rows 0, 1 and columns 0, 1 against rows 2, 3 and columns 2, 3.
SITE = Site(2, {"q": (0, torch.tensor([0, 0, 1, 1])), "o": (1, torch.tensor([0, 0, 1, 1]))})
RUN = dict(max_steps=24, learning_rate=2e-3, lr_scheduler_type="linear", warmup_steps=3)


def two_matrices(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.weight": torch.randn(4, 3, generator=generator, dtype=torch.float64),
        "o.weight": torch.randn(5, 4, generator=generator, dtype=torch.float64),
    }


def group(tensors: dict[str, torch.Tensor], which: int) -> np.ndarray:
    place = slice(2 * which, 2 * which + 2)
    return np.concatenate([tensors["q.weight"][place].numpy().ravel(), tensors["o.weight"][:, place].numpy().ravel()])


def step(tensors: dict[str, torch.Tensor], lr: float, penalty: float) -> None:
    size = group_sizes(tensors, SITE)
    norms = rms(tensors, SITE, size)
    factor = shrinkage(norms, torch.full_like(norms, lr), torch.tensor(penalty, dtype=torch.float64))
    scale_groups(tensors, SITE, factor)


def test_sizes_and_norms_are_those_of_the_concatenated_group():
    tensors = two_matrices()
    size = group_sizes(tensors, SITE)
    assert size.tolist() == [16.0, 16.0]
    expected = [np.linalg.norm(group(tensors, g)) / 4 for g in (0, 1)]
    np.testing.assert_allclose(rms(tensors, SITE, size).numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("penalty", [0.5, 3.0, 12.0])
def test_the_proximal_step_minimises_its_objective(penalty):
    """prox(v) = argmin_w |w - v|^2 / 2 + lr lambda sqrt(|g|) |w|: the subgradient there holds 0, and no neighbour is lower."""
    tensors, lr = two_matrices(), 0.1
    before = copy.deepcopy(tensors)
    step(tensors, lr, penalty)
    for g in (0, 1):
        v, w = group(before, g), group(tensors, g)
        if w.any():
            np.testing.assert_allclose(w - v + lr * penalty * 4 * w / np.linalg.norm(w), 0, atol=1e-12)
        else:
            assert np.linalg.norm(v) <= lr * penalty * 4

        def objective(x):
            return ((x - v) ** 2).sum() / 2 + lr * penalty * 4 * np.linalg.norm(x)  # noqa: B023

        draw = np.random.default_rng(g)
        assert all(
            objective(w) <= objective(w + draw.normal(0, size, w.shape)) for size in (1e-4, 1e-2, 1) for _ in range(20)
        )


def test_a_group_beyond_reach_is_zero_for_good():
    tensors = two_matrices()
    tensors["q.weight"][:2] *= 0.01
    tensors["o.weight"][:, :2] *= 0.01
    step(tensors, 0.1, 0.5)
    assert (group(tensors, 0) == 0).all() and (group(tensors, 1) != 0).all()
    step(tensors, 0.1, 0.5)
    assert (group(tensors, 0) == 0).all() and np.isfinite(group(tensors, 1)).all()


@pytest.mark.parametrize("count", [0, 1, 7, 19])
def test_the_penalty_zeroes_that_many_groups_in_time_whatever_moves_them(count):
    draw = np.random.default_rng(count)
    norms = torch.from_numpy(draw.uniform(0.5, 1.0, 20))
    for left in range(10, 0, -1):
        lr = torch.full_like(norms, 1e-3 * left)  # decays
        norms = (norms + torch.from_numpy(draw.normal(0, 0.01, 20))).abs()
        norms = norms * shrinkage(norms, lr, penalty_in_time(norms, lr, count, left))
    assert int((norms == 0).sum()) == count


def zero_groups(model, config) -> dict[str, tuple[int, int]]:
    """kind -> groups of which all weights are zero, and all groups."""
    ones = {name: (p.detach() != 0) for name, p in prunable_parameters(model).items()}
    found = {}
    for kind, places in prunable_sites(model, config).items():
        left = torch.cat([sum_by_part(ones, site) for site in places.values()])
        found[kind] = (int((left == 0).sum()), len(left))
    return found


class Zeros(TrainerCallback):
    def __init__(self, config):
        self.config, self.seen = config, []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.seen.append(zero_groups(model, self.config))


@pytest.mark.parametrize("granularity", [("head",), ("neuron",), ("head", "neuron"), ("channel",)])
def test_the_penalty_meets_the_target_by_itself_and_the_end_is_exact(tmp_path, granularity):
    config = GroupLassoConfig(sparsity=0.5, granularity=granularity)
    zeros = Zeros(config)
    trainer = multitask_trainer(tmp_path, config, callbacks=[zeros], **RUN)
    trainer.train()
    end = 18  # three quarters
    for kind in granularity:
        _, size = zeros.seen[0][kind]
        count = round(0.5 * size)
        assert abs(zeros.seen[end - 1][kind][0] - count) <= 0.01 * size, "the penalty alone, before anything is pruned"
        assert [seen[kind] for seen in zeros.seen[end:]] == [(count, size)] * 6
    assert zeros.seen[0] == {kind: (0, size) for kind, (_, size) in zeros.seen[0].items()}
    trainer.save_model(tmp_path / "saved")
    saved = MultitaskModel.from_pretrained(tmp_path / "saved")
    assert_same(find_masks(prunable_parameters(saved)), trainer.pruner.masks)
    assert not any(torch.signbit(p[p == 0]).any() for p in prunable_parameters(saved).values()), "+0.0"


def test_a_given_penalty_is_the_formula_on_top_of_adamw(tmp_path):
    """Two steps of the trainer, against torch's AdamW and the paper's factor by hand."""
    runs = {}
    for config in (None, GroupLassoConfig(sparsity=0.5, granularity="neuron", penalty=0.7, end_step=1)):
        trainer = multitask_trainer(tmp_path, config, max_steps=2, learning_rate=1e-3, lr_scheduler_type="constant")
        after = []

        class Look(TrainerCallback):
            def on_step_end(self, *args, model, **kwargs):
                after.append(weights(model))  # noqa: B023

        trainer.add_callback(Look())
        trainer.train()
        runs[config is not None] = after[0]
    plain, ours = runs[False], runs[True]
    for layer in (0, 1):
        name = f"encoder.encoder.layer.{layer}"
        up, down = f"{name}.intermediate.dense.weight", f"{name}.output.dense.weight"
        norm = (plain[up].square().sum(dim=1) + plain[down].square().sum(dim=0)).sqrt()
        factor = (1 - 1e-3 * 0.7 * 32**0.5 / norm).clamp(min=0)
        torch.testing.assert_close(ours[up], plain[up] * factor[:, None])
        torch.testing.assert_close(ours[down], plain[down] * factor)
        query = f"{name}.attention.self.query.weight"
        assert torch.equal(ours[query], plain[query]), "heads are not penalised"


def test_every_matrix_is_shrunk_by_its_own_learning_rate(tmp_path):
    model = tiny_model()
    names = {"slow": [], "fast": []}
    for name, p in model.named_parameters():
        names["fast" if "layer.1" in name else "slow"].append(p)
    optimizer = torch.optim.SGD([{"params": names["slow"], "lr": 0.0}, {"params": names["fast"], "lr": 1e-9}])
    before = weights(model)
    trainer = DisparseTrainer(
        model,
        arguments(tmp_path, max_steps=2, lr_scheduler_type="constant"),
        pruning_config=GroupLassoConfig(sparsity=0.25, granularity="channel", penalty=1e7, end_step=1),
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
        optimizers=(optimizer, None),
    )
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            seen.append(weights(model))

    trainer.add_callback(Look())
    trainer.train()
    for name in prunable_parameters(model):
        norm = before[name].square().mean(dim=0).sqrt()
        factor = (1 - 1e-9 * 1e7 / norm).clamp(min=0) if "layer.1" in name else torch.ones_like(norm)
        torch.testing.assert_close(seen[0][name], before[name] * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("die", [7, *slow(18)])
@pytest.mark.parametrize("granularity", [("head", "neuron"), *slow(("channel",))])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, granularity, die):
    config = GroupLassoConfig(sparsity=0.5, granularity=granularity, start_step=2, end_step=16)
    run = RUN | dict(save_strategy="steps", save_steps=4)
    whole = multitask_trainer(tmp_path / "whole", config, **run)
    whole.train()
    again = killed_and_resumed(tmp_path / "killed", config, die, **run)
    assert_same(weights(whole.model), weights(again.model))
    assert_same(whole.pruner.masks, again.pruner.masks)


@pytest.mark.parametrize("granularity", [("head",), ("neuron",)])
def test_what_went_is_compacted_and_the_logits_stay(tmp_path, granularity):
    config = GroupLassoConfig(sparsity=0.5, granularity=granularity)
    trainer = multitask_trainer(tmp_path, config, **RUN)
    trainer.train()
    model = trainer.model.eval()
    small = copy.deepcopy(model)
    whole = {"head": 4, "neuron": 64}[granularity[0]]
    assert compact(small)[granularity[0]] == (whole, whole // 2)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    for task in model.tasks:
        torch.testing.assert_close(small(input_ids=ids, task=task).logits, model(input_ids=ids, task=task).logits)


def test_channels_are_the_columns_of_every_matrix():
    parameters = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4, 5)}
    sites = channels(parameters)
    assert {name: site.parts for name, site in sites.items()} == {"a": 3, "b": 5}
    assert group_sizes(parameters, sites["b"]).tolist() == [4.0] * 5
    narrow = GroupLassoConfig(granularity="channel", target_modules=["query"])
    assert len(prunable_sites(tiny_model(), narrow)["channel"]) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"penalty": 0}, "penalty: expected a number above 0, or none at all, got 0"),
        ({"penalty": "1"}, "penalty: expected a number above 0"),
        ({"granularity": "weight"}, "granularity: unknown value 'weight' with method group_lasso"),
        (
            {"granularity": "2:4"},
            "expected one of head, neuron, channel with method group_lasso, got the pattern '2:4'",
        ),
        (
            {"granularity": ["head", "channel"]},
            "granularity: expected a single one, or several of head, neuron and layer",
        ),
        ({"criterion": "snip"}, "criterion: expected one of magnitude with method group_lasso, got 'snip'"),
        ({"decision": "unanimous"}, "decision: expected one of joint with method group_lasso, got 'unanimous'"),
        ({"schedule": "cubic"}, "schedule: expected one of linear with method group_lasso, got 'cubic'"),
        ({"start_step": 5, "end_step": 5}, "end_step: expected a step after start_step 5"),
        (
            {"granularity": "neuron", "target_modules": ["query"]},
            "target_modules: not used where a neuron is pruned as a whole; remove it",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_at_birth(values, message):
    with pytest.raises(UserError, match=message):
        GroupLassoConfig(**values)


def test_channels_go_with_this_method_only():
    with pytest.raises(UserError, match="granularity: unknown value 'channel' with method saliency"):
        PruningConfig(granularity="channel")


def test_more_than_all_but_one_head_of_each_layer_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"at most 0\.500, as one head of each of 2 sites stays"):
        multitask_trainer(tmp_path, GroupLassoConfig(sparsity=0.9), **RUN).train()


def test_the_config_round_trips_and_the_card_says_what_was_done(tmp_path):
    config = GroupLassoConfig(sparsity=0.5, granularity="channel", penalty=0.25)
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config
    assert "50 % of the input channels of its layers are pruned, those of the smallest norms" in str(
        write_card(tmp_path)
    )

"""Means of inputs and output gradients, against autograd on one example at a time and sums over one token at a time."""

import pytest
import torch
from transformers import DebertaV2Config

from hf_disparse import MultitaskConfig, MultitaskModel, UserError, prunable_parameters
from hf_disparse.model.architectures import find_sites
from hf_disparse.pruning.scores import model_loss
from hf_disparse.speed.choice import JudgedSite
from hf_disparse.speed.statistics import Statistics, gather, of_magnitude
from tests.helpers.compacting import model_of
from tests.helpers.tiny import CONFIGS, three_tasks
from tests.helpers.training import assert_same, weights

LABELS = {"two": torch.tensor([0, 1, 1]), "three": torch.tensor([0, 2, 1]), "real": torch.tensor([0.1, 0.7, -0.4])}


def batch_of(task: str, seed: int, padded: bool) -> dict:
    generator, mask = torch.Generator().manual_seed(seed), torch.ones(3, 5 + seed, dtype=torch.long)
    if padded:
        mask[1, 3:] = mask[2, 4:] = 0
    ids = torch.randint(4, 44, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": LABELS[task], "task": task}


def batches_of(padded: bool = True) -> dict[str, list[dict]]:
    return {task: [batch_of(task, seed, padded) for seed in range(1 + len(task) % 2, 3)] for task in LABELS}


def modules_of(model) -> list[str]:
    return [name.removesuffix(".weight") for name in prunable_parameters(model)]


def readers_of(model) -> list[str]:
    sites = find_sites(model.encoder, "encoder.")
    return [m for kind in ("head", "neuron") for s in sites[kind].values() for m, (dim, _) in s.members.items() if dim]


def found(model, batches, **kwargs) -> Statistics:
    return gather(model, modules_of(model), readers_of(model), batches, kwargs.pop("loss_fn", model_loss), **kwargs)


def by_tokens(model, name: str, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """H over all tasks' tokens, and G_t of each task; an example at a time, cut to its real tokens, so there is no padding."""
    all_inputs, curvature = [], []
    for of_task in batches.values():
        slopes = []
        for batch in of_task:
            for i, size in enumerate(batch["attention_mask"].sum(1).tolist()):
                calls = []
                handle = model.get_submodule(name).register_forward_hook(
                    lambda _, args, output, calls=calls: calls.append((args[0], output))
                )
                one = {k: batch[k][i : i + 1, :size] for k in ("input_ids", "attention_mask")}
                loss = model(**one, labels=batch["labels"][i : i + 1], task=batch["task"]).loss
                handle.remove()
                [(given, output)] = calls
                all_inputs += given[0].detach().double()
                slopes += torch.autograd.grad(loss, output)[0][0].double()
        curvature.append(sum(torch.outer(g, g) for g in slopes) / len(slopes))
    return sum(torch.outer(x, x) for x in all_inputs) / len(all_inputs), torch.stack(curvature)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of float32."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() > 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_they_are_means_over_single_tokens(model_type, padded):
    model, batches = model_of(model_type), batches_of(padded)
    statistics = found(model, batches)
    assert set(statistics.curvature) == set(readers_of(model)) and len(statistics.curvature) == 6
    assert set(statistics.gram) == set(statistics.diagonal) == set(modules_of(model))
    for name in modules_of(model)[-7:]:  # the last layer and a part of the one before
        gram, curvature = by_tokens(model, name, batches)
        near(statistics.gram[name], gram)
        near(statistics.diagonal[name], curvature.diagonal(dim1=1, dim2=2))
        if name in statistics.curvature:
            near(statistics.curvature[name], curvature)


def test_modules_with_one_input_share_one_tensor():
    statistics = found(model_of("bert"), batches_of())
    layer = "encoder.encoder.layer.1."
    query, key, value = (statistics.gram[f"{layer}attention.self.{n}"] for n in ("query", "key", "value"))
    assert query is key and key is value and query is not statistics.gram[f"{layer}intermediate.dense"]


def test_a_mask_of_ones_may_be_left_out():
    model, batches = model_of("bert"), batches_of(padded=False)
    bare = {task: [{k: v for k, v in b.items() if k != "attention_mask"} for b in of] for task, of in batches.items()}
    expected, got = found(model, batches), found(model, bare)
    for name in expected.gram:
        torch.testing.assert_close(got.gram[name], expected.gram[name])
        torch.testing.assert_close(got.diagonal[name], expected.diagonal[name])


def test_how_examples_are_batched_makes_no_difference():
    model, batches = model_of("bert"), batches_of()
    singly = {
        task: [{k: v if k == "task" else v[i : i + 1] for k, v in batch.items()} for batch in of for i in range(3)]
        for task, of in batches.items()
    }
    together, apart = found(model, batches), found(model, singly)
    for name in together.diagonal:
        near(apart.gram[name], together.gram[name])
        near(apart.diagonal[name], together.diagonal[name])


def test_the_model_stays_as_it_was():
    model = model_of("bert").train()
    model.encoder.requires_grad_(False)
    model.encoder.embeddings.word_embeddings.weight.requires_grad_(True)
    before, needs = weights(model), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():
        statistics = found(model, batches_of())
    assert_same(before, weights(model))
    assert needs == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules()) and torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    expected = found(model_of("bert"), batches_of())
    assert all(torch.equal(statistics.diagonal[name], expected.diagonal[name]) for name in expected.diagonal)


def test_joint_is_one_task_with_the_sum_of_curvatures():
    statistics = found(model_of("bert"), batches_of())
    joint = statistics.joint()
    assert joint.gram is statistics.gram
    for name, of_tasks in statistics.diagonal.items():
        near(joint.diagonal[name], of_tasks[0:1] + of_tasks[1:2] + of_tasks[2:3])
    for name, of_tasks in statistics.curvature.items():
        assert joint.curvature[name].shape == (1, *of_tasks.shape[1:])
        near(joint.curvature[name][0], of_tasks[0] + of_tasks[1] + of_tasks[2])


def test_in_units_each_task_would_lose_one_if_every_column_of_the_readers_went_alone():
    model = model_of("bert")
    parameters = {name: p.detach() for name, p in prunable_parameters(model).items()}
    before = found(model, batches_of())
    after = before.in_units(parameters)
    lost = torch.zeros(3, dtype=torch.float64)
    for name, curvature in after.curvature.items():
        for j, column in enumerate(parameters[f"{name}.weight"].double().T):
            for t in range(3):
                lost[t] += column @ curvature[t].double() @ column * after.gram[name][j, j] / 2
    torch.testing.assert_close(lost, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    for name in after.diagonal:  # all matrices of a task by one factor
        factors = after.diagonal[name] / before.diagonal[name]
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))


@pytest.mark.parametrize("task", ["two", "real"])
def test_the_scale_of_a_loss_changes_no_judgement(task):
    model, batches = model_of("bert"), batches_of()

    def sevenfold(model, batch):
        return (7 if batch["task"] == task else 1) * model_loss(model, batch)

    parameters = {name: p.detach() for name, p in prunable_parameters(model).items()}
    ours, theirs = (found(model, batches, loss_fn=f).in_units(parameters) for f in (model_loss, sevenfold))
    for kind in ("head", "neuron"):
        for site in find_sites(model.encoder, "encoder.")[kind].values():
            one, other = (JudgedSite(kind, site, parameters, s, [0.0, 0.5]) for s in (ours, theirs))
            assert torch.equal(one.removal.order, other.removal.order)
            torch.testing.assert_close(one.removal.rise, other.removal.rise, rtol=1e-3, atol=1e-9)
            for name, score in one.score.items():
                torch.testing.assert_close(score, other.score[name], rtol=1e-3, atol=0)


def test_by_magnitude_a_weight_costs_half_its_square_and_all_tasks_agree():
    model = model_of("bert")
    parameters = {name: p.detach() for name, p in prunable_parameters(model).items()}
    statistics = of_magnitude(parameters, readers_of(model))
    for kind in ("head", "neuron"):
        for site in find_sites(model.encoder, "encoder.")[kind].values():
            judged = JudgedSite(kind, site, parameters, statistics, [0.0])
            [(reader, owner)] = [(m, owner) for m, (dim, owner) in site.members.items() if dim]
            sums = torch.zeros(site.parts).index_add_(0, owner, parameters[f"{reader}.weight"].square().sum(0))
            assert judged.removal.order.tolist() == sums.argsort().tolist()
            for name, score in judged.score.items():
                torch.testing.assert_close(score, parameters[name].square() / 2 * 1.01, rtol=1e-5, atol=0)  # damped


def shared_keys() -> MultitaskModel:
    """DeBERTa-v2 whose key and query projections see tokens and relative positions, as in v3."""
    torch.manual_seed(0)
    config = DebertaV2Config(**{**CONFIGS["deberta-v2"]().to_diff_dict(), "share_att_key": True})
    return MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks())).eval()


@pytest.mark.parametrize(
    ("model", "module"), [(lambda: model_of("deberta-v2"), "pos_key_proj"), (shared_keys, "query_proj")]
)
def test_relative_positions_of_deberta_are_tokens_to_those_who_project_them(model, module):
    """One task and one batch of one text: gradients of texts that share positions cannot be told apart."""
    model, batch = model(), {k: v if k == "task" else v[:1] for k, v in batch_of("two", 1, padded=False).items()}
    statistics = found(model, {"two": [batch]})
    module, calls = next(name for name in modules_of(model) if name.endswith(f".{module}")), []
    handle = model.get_submodule(module).register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    loss = model(**batch).loss
    handle.remove()
    assert len(calls) == 1 + (module.endswith(".query_proj"))
    slopes = torch.autograd.grad(loss, [output for _, output in calls])
    rows = [row for given, _ in calls for row in given[0].detach()]
    near(statistics.gram[module], sum(torch.outer(row, row) for row in rows) / len(rows))
    tokens = batch["input_ids"].numel()
    near(statistics.diagonal[module], sum(row**2 for slope in slopes for row in slope[0])[None] / tokens)


def test_modules_share_a_tensor_only_if_all_their_inputs_are_shared():
    statistics = found(shared_keys(), batches_of())
    layer = "encoder.encoder.layer.1.attention.self."
    query, key, value = (statistics.gram[f"{layer}{n}_proj"] for n in ("query", "key", "value"))
    assert query is key and key is not value and not torch.equal(key, value)


def test_what_tells_nothing_is_refused():
    model, batches = model_of("bert"), batches_of()
    with pytest.raises(UserError, match="task 'real': expected at least one batch to judge by, got none"):
        found(model, {**batches, "real": []})
    with pytest.raises(UserError, match="task 'two': expected a finite loss, got nan"):
        found(model, batches, loss_fn=lambda model, batch: model_loss(model, batch) * float("nan"))
    unlabelled = {"two": [{k: v for k, v in batches["two"][0].items() if k != "labels"}]}
    with pytest.raises(UserError, match="got none; do the batches have labels"):
        found(model, unlabelled)
    with pytest.raises(UserError, match="task 'two': expected a loss of one pass of the encoder, got one of 2"):
        found(model, batches, loss_fn=lambda model, batch: model_loss(model, batch) + model_loss(model, batch))
    assert not any(module._forward_hooks for module in model.modules()), "hooks are taken away"

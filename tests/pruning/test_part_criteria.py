"""Taylor's criterion and the tasks' agreement: parts by brute force, training in steps, refused settings."""

import itertools

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import MultitaskModel, PruningConfig, UserError, compact, prunable_parameters
from hf_disparse.config import DynamicConfig
from hf_disparse.export.card import write_card
from hf_disparse.model.prunable import prunable_sites
from hf_disparse.pruning.part_criteria import agreement_and_need, agreement_score, taylor
from hf_disparse.pruning.parts import Site, sum_by_part
from hf_disparse.pruning.scores import gradients, score
from tests.helpers.resuming import killed_and_resumed
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.training import assert_same, multitask_trainer, weights

OWNER = torch.tensor([0, 0, 1, 1])
SITES = {"head": {"a": Site(2, {"q": (0, OWNER), "o": (1, OWNER)})}, "layer": {"": Site(1, {"q": (0, 0 * OWNER)})}}


def part(tensors, kind: str, which: int) -> np.ndarray:
    """All numbers of a part of SITES, as one vector."""
    q, o = tensors["q.weight"].numpy(), tensors["o.weight"].numpy()
    place = slice(2 * which, 2 * which + 2)
    return q.ravel() if kind == "layer" else np.concatenate([q[place].ravel(), o[:, place].ravel()])


def draw(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"q.weight": (4, 3), "o.weight": (5, 4)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.fixture
def drawn():
    """Weights, and three tasks' gradients on two batches."""
    generator = torch.Generator().manual_seed(0)
    return draw(generator), {task: [draw(generator) for _ in range(2)] for task in ("x", "y", "z")}


PARTS = [("head", "a", 0), ("head", "a", 1), ("layer", "", 0)]


def test_taylor_is_the_squared_sum_over_the_part_batch_by_batch(drawn):
    w, tasks = drawn
    scores = taylor(w, iter(tasks["x"]), SITES)
    for kind, name, i in PARTS:
        expected = sum((part(w, kind, i) * part(g, kind, i)).sum() ** 2 for g in tasks["x"])
        assert float(scores[kind][name][i]) == pytest.approx(expected, rel=1e-12)


def test_taylor_is_the_squared_change_of_a_linear_loss_once_the_part_is_gone(drawn):
    w, tasks = drawn
    slope = tasks["x"][0]  # L = sum slope w
    scores = taylor(w, [slope], SITES)["head"]["a"]
    whole = sum(float((slope[name] * w[name]).sum()) for name in w)
    for i in (0, 1):
        gone = {name: tensor.clone() for name, tensor in w.items()}
        gone["q.weight"][i == OWNER] = 0
        gone["o.weight"][:, i == OWNER] = 0
        without = sum(float((slope[name] * gone[name]).sum()) for name in w)
        assert float(scores[i]) == pytest.approx((whole - without) ** 2, rel=1e-12)


def test_agreement_is_the_sum_of_the_cosines_and_need_the_share_of_taylor(drawn):
    w, tasks = drawn
    agreed, need = agreement_and_need(w, ((task, iter(batches)) for task, batches in tasks.items()), SITES)
    for kind, name, i in PARTS:
        g = [part(batches[0], kind, i) + part(batches[1], kind, i) for batches in tasks.values()]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(g, 2)]
        assert float(agreed[kind][name][i]) == pytest.approx(3 + 2 * sum(cosines), rel=1e-12)
        alone = [taylor(w, batches, SITES)[kind] for batches in tasks.values()]
        expected = sum(float(scores[name][i] / sum(s.sum() for s in scores.values())) for scores in alone)
        assert float(need[kind][name][i]) == pytest.approx(expected, rel=1e-12)
        both = agreement_score(agreed, need)[kind][name][i]
        assert both == agreed[kind][name][i] * need[kind][name][i]


@pytest.mark.parametrize(("signs", "expected"), [((1, 1, 1), 9), ((1, -1), 0), ((1, 1, -1), 1), ((1,), 1)])
def test_the_same_direction_is_t_squared_and_opposite_ones_cancel(drawn, signs, expected):
    w, tasks = drawn
    g = tasks["x"][0]
    stream = ((i, [{n: sign * 10.0**i * t for n, t in g.items()}]) for i, sign in enumerate(signs))
    agreed, _ = agreement_and_need(w, stream, SITES)
    for kind, name, i in PARTS:
        assert float(agreed[kind][name][i]) == pytest.approx(expected, abs=1e-9)


def test_a_louder_loss_changes_nothing(drawn):
    w, tasks = drawn
    first = agreement_score(*agreement_and_need(w, tasks.items(), SITES))
    loud = {**tasks, "y": [{name: 1e4 * t for name, t in g.items()} for g in tasks["y"]]}
    second = agreement_score(*agreement_and_need(w, loud.items(), SITES))
    for kind, name, _ in PARTS:
        torch.testing.assert_close(first[kind][name], second[kind][name])


def test_a_part_that_nobody_needs_is_worth_nothing_however_they_agree(drawn):
    w, tasks = drawn
    w["q.weight"][:2] = 0
    w["o.weight"][:, :2] = 0
    same = {task: tasks["x"] for task in tasks}
    agreed, need = agreement_and_need(w, same.items(), SITES)
    assert agreed["head"]["a"].tolist() == pytest.approx([9, 9])
    assert agreement_score(agreed, need)["head"]["a"].tolist() == pytest.approx([0, 27])


def test_a_task_without_a_gradient_has_no_say(drawn):
    w, tasks = drawn
    silent = [{name: torch.zeros_like(t) for name, t in w.items()}]
    first = agreement_and_need(w, tasks.items(), SITES)
    second = agreement_and_need(w, {**tasks, "silent": silent}.items(), SITES)
    for one, other in zip(first, second, strict=True):
        for kind, name, _ in PARTS:
            assert torch.equal(one[kind][name], other[kind][name])


def batches_of(task: str, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(count)
    ids = [torch.randint(4, 44, (2, 6), generator=generator) for _ in range(count)]
    labels = torch.rand(2) if task == "real" else torch.tensor([0, 1])
    return [{"input_ids": i, "labels": labels, "task": task} for i in ids]


@pytest.mark.parametrize("joint", [False, True])
def test_streamed_gradients_are_those_of_plain_backward_passes(joint):
    model = tiny_model().eval()
    parameters = prunable_parameters(model)
    loaders = {task: batches_of(task, 2) for task in model.tasks}
    loud = {"three": 3.0}
    got = {
        t: list(steps) for t, steps in gradients(model, loaders, parameters=parameters, joint=joint, task_weights=loud)
    }
    for group in [list(loaders)] if joint else [[task] for task in loaders]:
        for i in range(2):
            model.zero_grad()
            for task in group:
                weight = loud.get(task, 1.0) if joint else 1.0
                (weight * model(**loaders[task][i]).loss).backward()
            for name, p in parameters.items():
                torch.testing.assert_close(got["joint" if joint else group[0]][i][name], p.grad)
    model.zero_grad()
    by_score = dict(score(model, loaders, "snip", parameters=parameters, joint=joint, task_weights=loud))
    for task, steps in got.items():
        for name, p in parameters.items():
            torch.testing.assert_close(by_score[task][name], p.detach().abs() * sum(step[name].abs() for step in steps))


def parts_gone(model, config) -> dict[str, int]:
    live = {name: p.detach() != 0 for name, p in prunable_parameters(model).items()}
    sites = prunable_sites(model, config)
    return {
        kind: sum(int((sum_by_part(live, site) == 0).sum()) for site in places.values())
        for kind, places in sites.items()
    }


@pytest.mark.parametrize("granularity", [("head",), ("head", "neuron"), ("layer",)])
@pytest.mark.parametrize(
    ("criterion", "decision"), [("taylor", "unanimous"), ("taylor", "joint"), ("agreement", "joint")]
)
def test_training_prunes_parts_in_exact_steps_with_training_between(tmp_path, criterion, decision, granularity):
    steps = dict(schedule="cubic", start_step=1, end_step=7, update_every=2, score_batches=2)
    config = PruningConfig(sparsity=0.5, granularity=granularity, criterion=criterion, decision=decision, **steps)
    gone = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            gone.append(parts_gone(model, config))

    trainer = multitask_trainer(tmp_path, config, callbacks=[Count()], max_steps=8)
    trainer.train()
    for kind in granularity:
        size = {"head": 4, "neuron": 64, "layer": 2}[kind]
        at = [round(0.5 * (1 - (1 - progress / 6) ** 3) * size) for progress in (2, 4, 6)]
        assert [counts[kind] for counts in gone] == [0, 0, 0, at[0], at[0], at[1], at[1], at[2]]
    assert trainer.backward_passes >= 8 + 3 * 2, "scoring counts"
    trainer.save_model(tmp_path / "saved")
    saved = MultitaskModel.from_pretrained(tmp_path / "saved")
    assert parts_gone(saved, config) == gone[-1]
    before, after = compact(saved)[granularity[0]]
    assert (before, after) == ({"head": 4, "layer": 2}[granularity[0]], before // 2)


def test_the_trainer_keeps_the_heads_that_the_pure_function_scores_highest(tmp_path):
    """One shot, no dropout in scoring: the masks are those of the scores on the trainer's own scoring batches."""
    config = PruningConfig(sparsity=0.5, granularity="neuron", criterion="agreement", decision="joint", score_batches=2)
    trainer = multitask_trainer(tmp_path, config, max_steps=1)
    model, loaders = trainer.model, trainer.pruner.loaders
    parameters, sites = prunable_parameters(model), prunable_sites(model, config)
    stream = gradients(model, loaders, parameters=parameters, num_batches=2, loss_fn=trainer.scoring_loss)
    scores = agreement_score(*agreement_and_need(parameters, stream, sites))["neuron"]
    flat = torch.cat(list(scores.values()))
    limit = flat.sort(descending=True).values[31]
    trainer.train()
    kept = torch.cat([sum_by_part(trainer.pruner.masks, site) > 0 for site in sites["neuron"].values()])
    assert torch.equal(kept, flat >= limit)


@pytest.mark.parametrize(
    ("criterion", "decision"), [("taylor", "max"), pytest.param("agreement", "joint", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, criterion, decision):
    config = PruningConfig(
        sparsity=0.5,
        granularity="neuron",
        criterion=criterion,
        decision=decision,
        schedule="cubic",
        end_step=10,
        update_every=3,
        score_batches=2,
    )
    run = dict(max_steps=12, save_strategy="steps", save_steps=4, learning_rate=3e-3)
    whole = multitask_trainer(tmp_path / "whole", config, **run)
    whole.train()
    for die in (6, 9):
        again = killed_and_resumed(tmp_path / str(die), config, die, **run)
        assert_same(weights(whole.model), weights(again.model))
        assert_same(whole.pruner.masks, again.pruner.masks)
        assert whole.backward_passes == again.backward_passes


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            PruningConfig,
            {"criterion": "taylor"},
            "granularity: criterion taylor scores parts such as head or neuron, got 'weight'",
        ),
        (
            PruningConfig,
            {"criterion": "agreement", "decision": "joint", "granularity": "2:4", "sparsity": 0.5},
            "granularity: criterion agreement scores parts such as head or neuron, got '2:4'",
        ),
        (
            PruningConfig,
            {"criterion": "agreement", "granularity": "head"},
            "decision: expected joint with criterion agreement, which is one score of all tasks, got 'unanimous'",
        ),
        (
            DynamicConfig,
            {"criterion": "taylor"},
            "criterion: expected one of magnitude, .* with method dynamic, got 'taylor'",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_at_birth(cls, values, message):
    with pytest.raises(UserError, match=message):
        cls(**values)


def test_the_card_says_that_the_tasks_agreement_decided(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = PruningConfig(sparsity=0.5, granularity="head", criterion="agreement", decision="joint")
    config.save_pretrained(tmp_path)
    assert "50 % of the heads of its layers are pruned, by the agreement of the tasks' gradients" in str(
        write_card(tmp_path)
    )

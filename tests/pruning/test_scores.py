"""Each criterion against hand-computed gradients."""

import pytest
import torch
from torch import nn

from hf_disparse import MultitaskModel, prunable_parameters, score
from tests.helpers.tiny import tiny_model, tokenized_rows


class Square(nn.Module):
    """loss = mean_i (w . x_i - y_i)^2 / 2, so that dL/dw = mean_i (w . x_i - y_i) x_i."""

    def __init__(self, weight: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x, y):
        error = (x @ self.weight.T).squeeze(1) - y
        return type("Output", (), {"loss": error.square().mean() / 2})


W = [2.0, -3.0, 0.0]
# w.x = 2*1 - 3*1 + 0 = -1 and error -2: g = (-2, -2, -4);  w.x = 4 and error 3: g = (6, 0, 3)
FIRST = {"x": torch.tensor([[1.0, 1.0, 2.0]]), "y": torch.tensor([1.0])}
SECOND = {"x": torch.tensor([[2.0, 0.0, 1.0]]), "y": torch.tensor([1.0])}
# sum |g| = (8, 2, 7); sum g^2 = (40, 4, 25)
BY_HAND = {
    "magnitude": [2.0, 3.0, 0.0],
    "snip": [2 * 8.0, 3 * 2.0, 0.0],
    "disparse": [4 * 8.0, 9 * 2.0, 0.0],
    "fisher": [4 * 40 / 2, 9 * 4 / 2, 0.0],
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_criterion_equals_the_hand_computed_one(criterion):
    model = Square(W)
    model.weight.grad = torch.ones(1, 3)
    found = dict(score(model, {"t": [FIRST, SECOND]}, criterion, parameters={"weight": model.weight}))
    assert found["t"]["weight"].tolist() == [pytest.approx(BY_HAND[criterion])]
    assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]], "a user's gradients were touched"


def test_joint_sums_the_weighted_losses_before_it_scores():
    model = Square(W)
    loaders = {"a": [FIRST], "b": [SECOND]}
    found = list(
        score(model, loaders, "snip", parameters={"weight": model.weight}, joint=True, task_weights={"b": 2.0})
    )
    # g = (-2, -2, -4) + 2 * (6, 0, 3) = (10, -2, 2): opposed gradients cancel, unlike votes
    assert [group for group, _ in found] == ["joint"]
    assert found[0][1]["weight"].tolist() == [[20.0, 6.0, 0.0]]


def test_random_is_seeded_and_differs_between_tasks():
    model = Square(W)
    kwargs = dict(parameters={"weight": model.weight})
    first = dict(score(model, {"a": [], "b": []}, "random", seed=3, **kwargs))
    again = dict(score(model, {"a": [], "b": []}, "random", seed=3, **kwargs))
    other = dict(score(model, {"a": [], "b": []}, "random", seed=4, **kwargs))
    assert torch.equal(first["a"]["weight"], again["a"]["weight"])
    assert not torch.equal(first["a"]["weight"], first["b"]["weight"])
    assert not torch.equal(first["a"]["weight"], other["a"]["weight"])


def batches(model: MultitaskModel, task: str, count: int) -> list[dict]:
    rows = tokenized_rows(model.tasks[task], count)
    return [
        {"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]]), "task": task} for r in rows
    ]


def test_scores_of_a_transformer_equal_those_of_plain_backward_passes():
    model = tiny_model().train()
    parameters = prunable_parameters(model)
    data = batches(model, "three", 3)
    found = dict(score(model, {"three": data}, "disparse", parameters=parameters))["three"]
    assert model.training, "the mode the model was in was not given back"
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in parameters.items():
            total[name] += p.grad.abs()
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], total[name] * p.detach() ** 2)


def test_scoring_leaves_weights_and_random_state_alone():
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    list(score(model, {"two": batches(model, "two", 2)}, parameters=prunable_parameters(model)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_short_loader_is_iterated_again():
    model = Square(W)
    kwargs = dict(parameters={"weight": model.weight})
    short = dict(score(model, {"t": [FIRST, SECOND]}, "snip", num_batches=3, **kwargs))
    long = dict(score(model, {"t": [FIRST, SECOND, FIRST]}, "snip", **kwargs))
    assert torch.equal(short["t"]["weight"], long["t"]["weight"])


def test_a_frozen_encoder_is_scored_and_stays_frozen_and_every_module_keeps_its_mode():
    model = tiny_model().train()
    data = {"two": batches(model, "two", 2)}
    parameters = prunable_parameters(model)
    free = dict(score(model, data, parameters=parameters))["two"]
    model.encoder.requires_grad_(False)
    model.encoder.eval()
    frozen = dict(score(model, data, parameters=parameters))["two"]
    assert all(torch.equal(free[name], frozen[name]) for name in parameters)
    assert not any(p.requires_grad for p in parameters.values())
    assert model.training and not any(module.training for module in model.encoder.modules())


def test_a_weight_that_has_no_part_in_a_loss_scores_zero():
    model = Square(W)
    unused = nn.Parameter(torch.ones(2))
    found = dict(score(model, {"t": [FIRST]}, "snip", parameters={"weight": model.weight, "unused": unused}))
    assert found["t"]["unused"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("loader", "options", "words"),
    [
        ([], {}, "task 't': expected at least one batch"),
        (iter([FIRST]), {"num_batches": 2}, "task 't': expected 2 batches.*got 1"),
        ([{**FIRST, "y": torch.tensor([float("nan")])}], {}, "task 't': expected a finite loss.*nan in batch 1"),
        ([FIRST], {"criterion": "sinp"}, "criterion: expected one of.*'sinp'"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_reason(loader, options, words):
    model = Square(W)
    with pytest.raises(ValueError, match=words):
        list(score(model, {"t": loader}, parameters={"weight": model.weight}, **options))


def test_batches_that_cannot_be_scored_together_are_named():
    model = tiny_model()
    parameters = prunable_parameters(model)
    unlabelled = {"input_ids": torch.tensor([[5]]), "task": "two"}
    with pytest.raises(
        ValueError, match="task 'two': the model returns no loss for a batch; do the batches have labels"
    ):
        dict(score(model, {"two": [unlabelled]}, "snip", parameters=parameters))
    batch = unlabelled | {"labels": torch.tensor([0])}
    loaders = {"two": [batch] * 2, "three": [batch | {"task": "three"}]}
    expected = "joint: the loaders differ in their number of batches; pass num_batches"
    with pytest.raises(ValueError, match=expected):
        dict(score(model, loaders, "snip", parameters=parameters, joint=True))
    assert list(dict(score(model, loaders, "snip", parameters=parameters, joint=True, num_batches=2))) == ["joint"]

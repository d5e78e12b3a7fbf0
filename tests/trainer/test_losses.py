"""What a step minimises: distillation, weights of tasks and PCGrad, against formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from hf_disparse.trainer.losses import (
    GradientSurgery,
    distillation_loss,
    hidden_loss,
    pcgrad_weights,
    uncertainty_weight,
)
from tests.helpers.losses import (
    CLASSES,
    LABELS,
    MASK,
    REAL,
    SHAPES,
    by_hand,
    generator,
    hidden_by_hand,
    project,
    some_labels,
    vector,
)


def some_logits(problem: str) -> list[torch.Tensor]:
    return [3 * torch.randn(SHAPES[problem], generator=generator(seed)) for seed in (0, 1)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("problem", SHAPES)
def test_distillation_is_the_formula_of_the_problem_type(problem, temperature):
    student, teacher = some_logits(problem)
    for dtype in (torch.float32, torch.bfloat16):  # which is summed in float32
        pair = student.to(dtype), teacher.to(dtype)
        ours = distillation_loss(*pair, problem, temperature, some_labels(problem))
        assert ours.item() == pytest.approx(by_hand(*pair, problem, temperature), rel=1e-5)


LN3 = math.log(3)  # softmax of (2 ln 3, 0) at temperature 2 is (3/4, 1/4), and so is the sigmoid of 2 ln 3


@pytest.mark.parametrize(
    ("problem", "student", "teacher", "expected"),
    [
        (CLASSES, [[0.0, 0.0]], [[2 * LN3, 0.0]], 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),
        (CLASSES, [[2 * LN3, 0.0]], [[0.0, 0.0]], 4 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2.0))),
        (LABELS, [[2 * LN3, 0.0]], [[2 * LN3, -5.0]], 2 * (math.log(4) - 0.75 * LN3 + math.log(2))),
        (REAL, [[1.0], [2.0]], [[3.0], [2.0]], 2.0),
    ],
)
def test_distillation_by_hand_at_temperature_2(problem, student, teacher, expected):
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), problem, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("problem", SHAPES)
def test_the_teachers_own_logits_pull_nowhere(problem):
    """The loss is zero, too, but for multi-label tasks, where the teacher's entropy is left."""
    teacher = some_logits(problem)[0]
    student = teacher.clone().requires_grad_(True)
    loss = distillation_loss(student, teacher, problem, 2.0, some_labels(problem))
    loss.backward()
    assert student.grad.abs().max() < 1e-6
    assert (loss.item() > 0.1) if problem == LABELS else abs(loss.item()) < 1e-6


@pytest.mark.parametrize(("problem", "share"), [(CLASSES, 1 / 4 / 3), (LABELS, 1 / 4 / 12)])
def test_hot_gradients_are_differences_of_logits_at_any_temperature(problem, share):
    """Hinton et al., eq. 4: (z - v) / N for N logits of mean zero; a sigmoid's slope at 0 is 1 / 4."""
    student, teacher = (logits - logits.mean(-1, keepdim=True) for logits in some_logits(problem))
    for temperature in (100.0, 1000.0):
        z = student.clone().requires_grad_(True)
        distillation_loss(z, teacher, problem, temperature).backward()
        torch.testing.assert_close(z.grad, share * (student - teacher), rtol=0.1, atol=0.01)


def test_hidden_states_are_compared_over_real_tokens_only():
    hidden, teacher = torch.randn(2, 3, 3, 6, 4, generator=generator(0))
    expected = hidden_by_hand(hidden, teacher)
    hidden[:, MASK == 0] = 1e6
    assert hidden_loss(list(hidden), list(teacher), MASK).item() == pytest.approx(expected, rel=1e-5)
    assert hidden_loss(teacher, teacher, MASK).item() == 0


def test_the_uncertainty_weight_is_kendalls_at_its_optimum_and_at_most_1000():
    for mean in (0.01, 0.5, 1.0, 7.0):
        s = minimize_scalar(lambda s, mean=mean: math.exp(-s) * mean + s, bounds=(-10, 10), options={"xatol": 1e-9}).x
        assert uncertainty_weight(mean) == pytest.approx(math.exp(-s), rel=1e-4)
    assert uncertainty_weight(0.0) == uncertainty_weight(1e-9) == pytest.approx(1000)


def surgery(gradients, seed: int = 0) -> np.ndarray:
    """The same by our weights, from inner products alone."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    return (pcgrad_weights(gradients @ gradients.T, generator(seed)) @ gradients).numpy()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_weights_from_inner_products_are_pcgrad_on_the_vectors(data, tasks, width, seed):
    row = st.lists(st.integers(-5, 5), min_size=width, max_size=width) | st.just([0] * width)
    gradients = np.array(data.draw(st.lists(row, min_size=tasks, max_size=tasks)), dtype=float)
    np.testing.assert_allclose(surgery(gradients, seed), project(gradients, seed), rtol=1e-9, atol=1e-9)
    agreeing = np.abs(gradients)
    np.testing.assert_array_equal(surgery(agreeing, seed), agreeing.sum(0))


def test_pcgrad_by_hand():
    conflict = [1, 0], [-1, 1]  # (1, 0) -> (1/2, 1/2) and (-1, 1) -> (0, 1)
    assert surgery(conflict).tolist() == surgery([[0, 0], *conflict]).tolist() == [0.5, 1.5]
    np.testing.assert_allclose(surgery([[3, 4], [-6, -8]]), [0, 0], atol=1e-12)  # opposite ones leave nothing
    assert surgery([[0, 0], [0, 0]]).tolist() == [0, 0]
    assert surgery([[2, -1]]).tolist() == [2, -1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_surgery_on_parameters_is_pcgrad_on_long_vectors(tasks, seed):
    """Tasks take twice on average, each time with some gradients missing; two steps, for the first must be forgotten."""
    random, operation = np.random.default_rng(seed), GradientSurgery()
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (4,), (1, 5), (2,))]
    for step in range(2):
        total = {}  # in the order in which tasks first come
        for task in random.integers(tasks, size=2 * tasks).tolist():
            for p in parameters[:-1]:
                p.grad = torch.tensor(random.normal(size=p.shape)).float() if random.random() < 0.7 else None
            total[task] = total.get(task, 0) + vector(parameters)
            operation.take(f"task {task}", parameters)
            assert all(p.grad is None for p in parameters)
        operation.give(generator(seed + step))
        expected = project(np.array(list(total.values())), seed + step)
        np.testing.assert_allclose(vector(parameters), expected, rtol=1e-4, atol=1e-5)
        assert parameters[-1].grad is None, "no task had one"


def test_a_tiny_gradient_against_a_large_one_stays_finite():
    operation, parameter = GradientSurgery(), nn.Parameter(torch.zeros(2))
    for task, gradient in (("a", [1.0, 0.0]), ("b", [-1e-23, 1e-23])):
        parameter.grad = torch.tensor(gradient)
        operation.take(task, [parameter])
    operation.give(generator(0))
    assert parameter.grad.tolist() == pytest.approx([0.5, 0.5])

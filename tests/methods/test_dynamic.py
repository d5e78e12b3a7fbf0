"""Dynamic sparse training: exact budgets, RigL's rule written out in numpy, what the optimizer forgets, and the config."""

import math

import numpy as np
import pytest
import torch

from hf_disparse import DynamicConfig, PruningConfig, UserError, score
from hf_disparse.methods.dynamic import (
    allocate,
    drop_counts,
    erdos_renyi,
    grow,
    reset_optimizer_state,
    round_to,
    select,
    uniform,
)
from hf_disparse.pruning.schedule import cosine_decay
from tests.helpers.dynamic import brute_force
from tests.helpers.training import assert_same, multitask_trainer

SQUARES = {"a": (2, 2), "b": (4, 4), "c": (8, 8)}  # 4, 16 and 64 weights; n_in + n_out = 4, 8 and 16


# Allocation


def test_erdos_renyi_equals_numbers_made_by_hand():
    # 21 weights: eps = 21 / 28 = 0.75, so 3, 6 and 12, densities 0.75, 0.375 and 0.1875
    assert erdos_renyi(SQUARES, 21) == {"a": 3.0, "b": 6.0, "c": 12.0}
    # 42 weights: eps = 1.5 asks 6 of the 4 of a, which is dense; the others share 38 at eps = 38 / 24
    assert erdos_renyi(SQUARES, 42) == pytest.approx({"a": 4.0, "b": 38 / 3, "c": 76 / 3})
    assert allocate("erk", SQUARES, 42) == {("a",): 4, ("b",): 13, ("c",): 25}
    # 52 weights: eps = 52 / 28 leaves b below 16, eps = 48 / 24 after a is dense does not
    assert erdos_renyi(SQUARES, 52) == {"a": 4.0, "b": 16.0, "c": 32.0}
    assert allocate("erk", SQUARES, 84) == {("a",): 4, ("b",): 16, ("c",): 64}


def test_uniform_rounds_by_largest_remainder():
    # a tenth of 4, 16 and 64, of 84 weights 8: 0.38, 1.52 and 6.10
    assert uniform(SQUARES, 8) == pytest.approx({"a": 8 / 21, "b": 32 / 21, "c": 128 / 21})
    assert allocate("uniform", SQUARES, 8) == {("a",): 0, ("b",): 2, ("c",): 6}
    assert allocate("global", SQUARES, 8) == {("a", "b", "c"): 8}
    assert round_to({"a": 0.5, "b": 0.5, "c": 1.0}, 2) == {"a": 1, "b": 0, "c": 1}, "ties go by position"


@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_allocations_are_exact_and_follow_their_density(allocation):
    generator = np.random.default_rng(0)
    for _ in range(200):
        shapes = {f"w{i}": tuple(map(int, generator.integers(1, 40, 2))) for i in range(generator.integers(1, 9))}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        count = int(generator.integers(0, sum(sizes.values()) + 1))
        counts = {name: number for (name,), number in allocate(allocation, shapes, count).items()}
        assert sum(counts.values()) == count
        assert all(0 <= counts[name] <= sizes[name] for name in shapes)
        # One matrix at a time becomes dense, the densest first: RigL's loop.
        dense = set()
        while allocation == "erk":
            rest = [name for name in shapes if name not in dense]
            eps = (count - sum(sizes[n] for n in dense)) / max(1, sum(sum(shapes[n]) for n in rest))
            worst = max(rest, key=lambda n: sum(shapes[n]) / sizes[n], default=None)
            if worst is None or eps * sum(shapes[worst]) <= sizes[worst]:
                break
            dense.add(worst)
        for name in shapes:
            if allocation == "uniform":
                share = count / sum(sizes.values()) * sizes[name]
            else:
                share = sizes[name] if name in dense else eps * sum(shapes[name])
            assert abs(counts[name] - share) < 1 + 1e-6


def test_the_share_that_is_exchanged_falls_as_a_cosine():
    # (1 + cos(pi t / T)) / 2 is 1, 3/4, 1/2, 1/4 and 0 at none, a third, a half, two thirds and all of the way
    values = [cosine_decay(step, 40, 100, 0.4) for step in (10, 40, 60, 70, 80, 100, 300)]
    assert values == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.1, 0, 0])


# Drop and grow


def tied(seed: int, tasks: int = 3) -> tuple[dict, dict]:
    """Scores of some tasks with many ties and zeros, and a mask with half of the weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (6, 5), "y": (4, 9), "z": (3, 3)}
    scores = {
        f"t{i}": {n: torch.randint(0, 8, s, generator=generator) / 4 for n, s in shapes.items()} for i in range(tasks)
    }
    return scores, {n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_select_equals_the_definition(quorum, whole):
    for seed in range(20):
        scores, among = tied(seed)
        groups = [tuple(among)] if whole else [(name,) for name in among]
        counts = {group: sum(int(among[n].sum()) for n in group) * (seed % 5) // 4 for group in groups}
        chosen = select(iter(scores.items()), among, counts, quorum)
        assert list(chosen) == list(among)
        for group, count in counts.items():
            flat = [np.concatenate([s[n].numpy().ravel() for n in group]) for s in scores.values()]
            eligible = np.concatenate([among[n].numpy().ravel() for n in group])
            expected = brute_force(flat, eligible, count, quorum)
            got = np.concatenate([chosen[n].numpy().ravel() for n in group])
            assert set(np.flatnonzero(got)) == expected


def rigl(weight: np.ndarray, gradient: np.ndarray, live: np.ndarray, fraction: float) -> np.ndarray:
    """Algorithm 1 of Evci et al. on one flat layer: drop ArgTopK(-|w|), grow ArgTopK of |g| outside of what is left."""
    active = [i for i in range(len(weight)) if live[i]]
    k = int(fraction * len(active))
    left = set(sorted(active, key=lambda i: abs(weight[i]))[k:])
    outside = [i for i in range(len(weight)) if i not in left]
    grown = sorted(outside, key=lambda i: -abs(gradient[i]))[:k]
    return np.isin(np.arange(len(weight)), [*left, *grown])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_one_task_by_magnitude_is_rigl(fraction):
    generator = torch.Generator().manual_seed(3)
    weight, gradient = (torch.randn(7, 11, generator=generator) for _ in range(2))
    live = torch.rand(7, 11, generator=generator) < 0.4
    budget = {("w",): int(live.sum())}
    left = select({"": {"w": weight.abs()}}, {"w": live}, drop_counts({"w": live}, budget, fraction))
    mask = grow({"": {"w": gradient.abs()}}, left, budget)["w"]
    expected = rigl(weight.numpy().ravel(), gradient.numpy().ravel(), live.numpy().ravel(), fraction)
    assert mask.numpy().ravel().tolist() == expected.tolist()
    assert int(mask.sum()) == int(live.sum())


def test_growth_is_the_union_of_the_tasks_own_choices_cut_at_the_budget():
    for seed in range(20):
        scores, live = tied(seed)
        live, count = live["y"].ravel(), 7
        budget = {("y",): int(live.sum()) + count}
        grown = grow({t: {"y": s["y"].ravel()} for t, s in scores.items()}, {"y": live}, budget)["y"] & ~live
        assert int(grown.sum()) == count
        unions = []
        for k in range(count + 1):
            tops = [brute_force([s["y"].numpy().ravel()], ~live.numpy(), k, 1) for s in scores.values()]
            unions.append(set.union(*tops))
        largest = max(k for k, union in enumerate(unions) if len(union) <= count)
        got = set(np.flatnonzero(grown.numpy()))
        assert unions[largest] <= got
        assert largest == count or got <= unions[largest + 1], "filled up from what the tasks want next"


def test_a_mask_of_another_size_is_brought_to_the_budget():
    live = {"x": torch.tensor([True] * 8 + [False] * 2), "y": torch.tensor([True] * 2 + [False] * 8)}
    budget = {("x",): 5, ("y",): 6}
    assert drop_counts(live, budget, 0.5) == {("x",): 3, ("y",): 1}
    values = {"t": {n: torch.arange(10.0) for n in live}}
    left = select(values, live, drop_counts(live, budget, 0.5))
    mask = grow(values, left, budget)
    assert {n: int(m.sum()) for n, m in mask.items()} == {"x": 5, "y": 6}
    assert left["x"].nonzero().ravel().tolist() == [5, 6, 7]
    assert mask["x"].nonzero().ravel().tolist() == [5, 6, 7, 8, 9]


def test_scores_that_are_not_finite_and_a_quorum_without_tasks_are_refused():
    live = {"w": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="expected finite numbers, got NaN or infinity in 'w' of task 't'"):
        select({"t": {"w": torch.tensor([1.0, math.nan, 0, 0])}}, live, {("w",): 2})
    with pytest.raises(ValueError, match=r"quorum: expected a whole number in 1\.\.1"):
        select({"t": {"w": torch.ones(4)}}, live, {("w",): 2}, quorum=2)


def test_the_score_of_growth_is_the_gradient_of_the_summed_batches():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    batches = [{"x": torch.randn(4, 3)} for _ in range(3)]
    scored = score(
        model,
        {"t": batches},
        "gradient",
        parameters={"weight": model.weight},
        num_batches=3,
        loss_fn=lambda m, b: m(b["x"]).square().mean(),
    )
    sum(model(b["x"]).square().mean() for b in batches).backward()
    torch.testing.assert_close(dict(scored)["t"]["weight"], model.weight.grad.abs())


# The optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p),
    ],
)
def test_the_optimizer_forgets_grown_weights_and_nothing_else(make):
    torch.manual_seed(0)
    weight, other = (torch.nn.Parameter(torch.randn(5, 6)) for _ in range(2))
    optimizer = make([weight, other])
    for _ in range(3):
        (weight.square().sum() + other.square().sum()).backward()
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[weight].items()}
    rest = {k: v.clone() for k, v in optimizer.state[other].items()}
    grown = torch.rand(5, 6) < 0.5
    reset_optimizer_state(optimizer, weight, grown)
    for key, value in optimizer.state[weight].items():
        expected = torch.where(grown, 0.0, before[key]) if value.shape == grown.shape else before[key]
        assert torch.equal(value, expected), key
    assert_same(rest, optimizer.state[other])
    reset_optimizer_state(None, weight, grown)


# The config


def test_the_config_round_trips_and_is_chosen_by_its_method(tmp_path):
    config = DynamicConfig(sparsity=0.9, allocation="global", drop_fraction=0.3, decision="quorum", quorum=2)
    config.save_pretrained(tmp_path)
    assert PruningConfig.from_pretrained(tmp_path) == config
    assert type(PruningConfig.from_dict({"method": "dynamic"})) is DynamicConfig
    assert DynamicConfig().end_share == 0.75


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"allocation": "erdos"}, "allocation: expected one of erk, uniform, global, got 'erdos'"),
        ({"drop": "random"}, "drop: expected one of magnitude, disentangled, got 'random'"),
        (
            {"criterion": "magnitude", "drop": "disentangled"},
            "drop: expected magnitude with criterion magnitude, got .disentangled.; or set criterion: disparse",
        ),
        ({"drop_fraction": 1}, r"drop_fraction: expected a number in \[0, 1\), got 1"),
        ({"drop_fraction": True}, "drop_fraction: expected a number"),
        ({"schedule": "cubic", "end_step": 9}, "schedule: expected one of constant with method dynamic, got 'cubic'"),
        ({"decision": "sum"}, "decision: expected one of unanimous, quorum, joint with method dynamic, got 'sum'"),
        ({"granularity": "head"}, "granularity: unknown value 'head' with method dynamic"),
        ({"start_step": 5, "end_step": 5}, "end_step: expected a step after start_step 5"),
        ({"reinitialise": True}, "reinitialise: must be false with method dynamic"),
    ],
)
def test_what_cannot_go_together_is_refused_at_birth(values, words):
    with pytest.raises(UserError, match=words):
        DynamicConfig(**values)


def test_a_schedule_that_training_would_cut_off_is_refused(tmp_path):
    with pytest.raises(UserError, match="the last pruning is at step 8, training ends at step 8"):
        multitask_trainer(tmp_path, DynamicConfig(update_every=2, end_step=8)).train()

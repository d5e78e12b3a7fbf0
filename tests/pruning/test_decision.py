"""The decision rules against slow, obvious references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_disparse import decide, decide_max, decide_mean_rank, decide_sum
from hf_disparse.pruning.decision import keep_smallest, ranks


def brute_force(scores: list[np.ndarray], sparsity: float, quorum: int, active: np.ndarray | None = None) -> np.ndarray:
    """The rule as its definition says it: raise the common k until the weights that at least `quorum` tasks rank among
    their k best exceed the budget, then fill up by position from those that enter next, or if nobody wants more, from the rest."""
    size = len(scores[0])
    active = np.ones(size, bool) if active is None else active
    budget = size - round(sparsity * size)
    orders = [sorted((i for i in range(size) if s[i] > 0 and active[i]), key=lambda i: (-s[i], i)) for s in scores]
    kept = np.zeros(size, bool)
    for k in range(size + 1):
        votes = np.zeros(size, int)
        for order in orders:
            votes[order[:k]] += 1
        wanted = (votes >= quorum) & active
        if wanted.sum() >= budget:
            entering = np.flatnonzero(wanted & ~kept)
            kept[entering[: budget - kept.sum()]] = True
            return kept
        kept = wanted
    others = np.flatnonzero(active & ~kept)
    kept[others[: budget - kept.sum()]] = True
    return kept


# Few distinct values make ties the rule rather than the exception; 0 is the most frequent score of a real model.
_tied = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0]), min_size=12, max_size=12)
_spread = st.lists(st.floats(0, 2.0**100, width=32), min_size=12, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(_tied | _spread, min_size=1, max_size=5), st.floats(0, 0.99), st.data())
def test_quorum_equals_the_definition(rows, sparsity, data):
    quorum = data.draw(st.integers(1, len(rows)))
    scores = {
        f"t{i}": {"a": torch.tensor(row[:8]).view(2, 4), "b": torch.tensor(row[8:])} for i, row in enumerate(rows)
    }
    masks = decide(scores, sparsity, quorum)
    assert masks["a"].shape == (2, 4)
    assert masks["b"].shape == (4,)
    found = torch.cat([masks["a"].reshape(-1), masks["b"]]).numpy()
    expected = brute_force([np.array(row, np.float32) for row in rows], sparsity, quorum)
    assert (found == expected).all()
    assert (~found).sum() == round(sparsity * 12)


@settings(max_examples=200, deadline=None)
@given(st.lists(_tied, min_size=1, max_size=4), st.data())
def test_what_active_pruned_stays_pruned_and_does_not_compete(rows, data):
    active = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    active[0] = True  # sparsity 1 is none
    target = data.draw(st.integers(int((~active).sum()), 11))
    scores = {f"t{i}": {"w": torch.tensor(row)} for i, row in enumerate(rows)}
    found = decide(scores, target / 12, active={"w": torch.tensor(active)})["w"].numpy()
    expected = brute_force([np.array(row, np.float32) for row in rows], target / 12, 1, active)
    assert (found == expected).all()
    assert not found[~active].any()
    for rule in (decide_sum, decide_max, decide_mean_rank):
        kept = rule(scores, target / 12, active={"w": torch.tensor(active)})["w"].numpy()
        assert (~kept).sum() == target
        assert not kept[~active].any()


def test_a_task_without_an_opinion_has_no_vote():
    """Zero scores, such as those without a gradient, must not protect the first weights of the encoder."""
    opinion, none = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1, torch.zeros(1000)
    for rule in (decide, decide_sum, decide_max, decide_mean_rank):
        alone = rule({"a": {"w": opinion}}, 0.9)["w"]
        for others in ({"b": {"w": none}}, {"b": {"w": none}, "c": {"w": -none}}):
            assert torch.equal(rule({"a": {"w": opinion}, **others}, 0.9)["w"], alone), rule.__name__
    few = torch.where(torch.arange(1000) >= 990, opinion, 0.0)  # wants ten weights, and no more
    kept = decide({"a": {"w": opinion}, "b": {"w": few}}, 0.9)["w"]
    signed = torch.tensor([-1.0, 0.0, 2.0, -3.0])  # as in movement pruning, where 0 is better than less
    assert decide({"a": {"w": signed}}, 0.5)["w"].tolist() == [False, True, True, False]
    assert kept[990:].all() and opinion[kept].sum() >= opinion.topk(90).values.sum()


def test_a_weight_that_one_task_needs_survives_unanimous_pruning_but_not_the_sum():
    # Task a needs weight 0 most; all others are moderately useful to every task.
    a = torch.tensor([1.0, 0.9, 0.9, 0.9])
    b = torch.tensor([0.0, 5.0, 5.0, 5.0])
    c = torch.tensor([0.0, 5.0, 5.0, 5.0])
    scores = {"a": {"w": a}, "b": {"w": b}, "c": {"w": c}}
    assert decide(scores, 0.5)["w"].tolist() == [True, True, False, False]
    assert decide(scores, 0.5, quorum=2)["w"].tolist() == [False, True, True, False]
    assert not decide_sum(scores, 0.25)["w"][0]


@pytest.mark.parametrize("seed", range(3))
def test_sum_max_and_mean_rank_equal_numpy(seed):
    rng = np.random.default_rng(seed)
    rows = rng.random((3, 50)) * np.array([[1], [100], [1e-4]])
    scores = {f"t{i}": {"w": torch.tensor(row)} for i, row in enumerate(rows)}
    normal = rows / rows.sum(1, keepdims=True)
    rank = (-rows).argsort(1, kind="stable").argsort(1, kind="stable")
    for rule, cost in ((decide_sum, -normal.sum(0)), (decide_max, -normal.max(0)), (decide_mean_rank, rank.sum(0))):
        expected = np.zeros(50, bool)
        expected[np.argsort(cost, kind="stable")[:15]] = True
        assert (rule(scores, 0.7)["w"].numpy() == expected).all(), rule.__name__


def test_scale_of_a_task_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 200, generator=generator)
    for rule in (decide, decide_sum, decide_max, decide_mean_rank):
        plain = rule({"a": {"w": a}, "b": {"w": b}}, 0.8)["w"]
        scaled = rule({"a": {"w": a * 1024}, "b": {"w": b / 1024}}, 0.8)["w"]
        assert torch.equal(plain, scaled), rule.__name__


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_all_zero_scores_still_give_the_exact_count(sparsity):
    zero = {"w": torch.zeros(10, 10)}
    for rule in (decide, decide_sum, decide_max, decide_mean_rank):
        assert (~rule({"a": zero, "b": zero}, sparsity)["w"]).sum() == round(100 * sparsity)


def test_one_task_is_plain_pruning_by_score():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    keep = decide({"only": {"w": scores}}, 0.75)["w"]
    assert torch.equal(keep, scores >= scores.sort(descending=True).values[249])


def test_sums_do_not_overflow():
    scores = {"t": {"w": torch.tensor([1, 2, 3, 1.7e308, 1.6e308], dtype=torch.float64)}}
    for rule in (decide_sum, decide_max):
        assert rule(scores, 0.6)["w"].tolist() == [False, False, False, True, True]


def test_tasks_are_consumed_one_at_a_time():
    alive = []

    def stream():
        for i in range(4):
            assert len(alive) == i, "the next task was asked for before the last one was folded in"
            yield f"t{i}", {"w": torch.rand(10)}
            alive.append(i)

    assert decide(stream(), 0.5)["w"].sum() == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ranks_are_those_of_a_stable_sort(dtype):
    scores = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores[::7] = 0.0
    scores[::14] = -0.0
    order = np.argsort(-scores.double().numpy(), kind="stable")
    expected = np.empty(5000, np.int64)
    expected[order] = np.arange(5000)
    assert (ranks(scores).numpy() == expected).all()


@pytest.mark.slow
def test_ranks_beyond_the_integers_of_float32_stay_exact():
    size = 2**24 + 8
    rank = ranks(torch.arange(size, dtype=torch.float64))
    assert torch.equal(rank, torch.arange(size - 1, -1, -1, dtype=torch.int32))


def test_keep_smallest_breaks_ties_by_position():
    assert keep_smallest(torch.tensor([1, 0, 1, 1]), 2).tolist() == [True, True, False, False]
    assert keep_smallest(torch.tensor([1, 0]), 0).tolist() == [False, False]


_ONES = {"w": torch.ones(4)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, 0.5), "at least one task"),
        (({"a": {}}, 0.5), "at least one parameter"),
        (({"a": _ONES, "b": {"v": torch.ones(4)}}, 0.5), "task 'b'.*'v'"),
        (({"a": _ONES, "b": {"w": torch.ones(5)}}, 0.5), r"task 'b'.*shape \(4,\) for 'w'.*\(5,\)"),
        (({"a": {"w": torch.tensor([1.0, float("nan")])}}, 0.5), "NaN or infinity in 'w' of task 'a'"),
        (({"a": {"w": torch.tensor([1.0, float("inf")])}}, 0.5), "NaN or infinity in 'w' of task 'a'"),
        (({"a": _ONES}, 1.0), r"sparsity.*\[0, 1\).*1.0"),
        (({"a": _ONES}, -0.1), r"sparsity.*\[0, 1\)"),
        (({"a": _ONES}, float("nan")), r"sparsity.*\[0, 1\)"),
        (({"a": _ONES}, 0.5, 0), r"quorum.*1\.\.T.*0"),
        (({"a": _ONES}, 0.5, True), r"quorum.*True"),
        (({"a": _ONES}, "0.5"), r"sparsity.*'0.5'"),
        (({"a": _ONES}, 0.5, 2), r"quorum.*1\.\.1.*2"),
        (({"a": _ONES}, 0.25, 1, {"w": torch.tensor([True, True, False, False])}), "already has 2"),
        (({"a": _ONES}, 0.5, 1, {"v": torch.ones(4).bool()}), "`active`.*'v'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(arguments, words):
    with pytest.raises(ValueError, match=words):
        decide(*arguments)

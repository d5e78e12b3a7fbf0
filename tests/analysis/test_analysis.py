"""The measures of the tasks' own masks, against slow, obvious references and planted truths."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_disparse import decide
from hf_disparse.analysis import (
    agreement,
    by_layer,
    gradient_cosine,
    keepers,
    own_mask,
    part_scores,
    parts,
    shared_importance,
    sketch,
    tally,
    watershed,
    watershed_interval,
)
from hf_disparse.analysis.names import layer_and_kind
from hf_disparse.pruning.parts import Site
from tests.helpers.analyses import matrix_names, random_masks

torch.set_num_threads(1)

# IoU of the two tasks' masks on NYU-v2, layer by layer, as the authors of DiSparse published it, rounded
NYU_V2 = [
    0.968, 0.947, 0.939, 0.928, 0.913, 0.909, 0.893, 0.866, 0.755, 0.726, 0.670, 0.636, 0.575, 0.556, 0.471, 0.381, 0.129,
    0.101, 0.049, 0.044, 0.018, 0.022, 0.021, 0.014, 0.030, 0.030, 0.036, 0.061, 0.034, 0.028, 0.034, 0.063, 0.028,
]  # fmt: skip


# Names and masks


def test_a_kind_is_the_shortest_ending_that_tells_matrices_of_a_layer_apart():
    bert = [
        "attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense",
    ]  # fmt: skip
    found = layer_and_kind(
        [*(f"encoder.encoder.layer.{i}.{name}.weight" for i in (0, 11) for name in bert), "encoder.pooler.weight"]
    )
    assert [kind for _, kind in found.values()] == 2 * ["query", "key", "attention.output", "intermediate", "output"]
    assert [layer for layer, _ in found.values()] == [0] * 5 + [11] * 5  # and what is in no layer is left out
    factors = layer_and_kind(["layer.0.a.query.up.weight", "layer.0.a.key.up.weight", "layer.0.a.key.down.weight"])
    assert [kind for _, kind in factors.values()] == ["query.up", "key.up", "down"]
    assert layer_and_kind(["backbone.blocks.2.0.conv1"]) == {"backbone.blocks.2.0.conv1": (2, "conv1")}


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.99), st.sampled_from(["normal", "ties", "tiny"]), st.booleans())
def test_an_own_mask_is_the_decision_of_one_task(seed, sparsity, kind, partly):
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(40, generator=generator)}
    if kind == "ties":
        scores = {name: tensor.round() for name, tensor in scores.items()}
    if kind == "tiny":  # differ in the lowest bits only
        scores = {name: 1 + tensor * 1e-7 for name, tensor in scores.items()}
    mine = own_mask(scores, sparsity)
    theirs = decide({"t": scores}, sparsity)
    assert all(torch.equal(mine[name], theirs[name]) for name in scores)
    if partly:
        live = {name: torch.rand(tensor.shape, generator=generator) < 0.5 for name, tensor in scores.items()}
        flat, alive = (torch.cat([x[name].flatten() for name in scores]) for x in (scores, live))
        size = int(alive.sum())
        order = sorted((i for i in range(75) if alive[i]), key=lambda i: -float(flat[i]))  # stable: ties by position
        expected = set(order[: size - round(sparsity * size)])
        kept = torch.cat([mask.flatten() for mask in own_mask(scores, sparsity, live).values()])
        assert set(kept.nonzero().flatten().tolist()) == expected


def test_an_own_mask_refuses_what_has_no_order():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            own_mask({"a": torch.tensor([1.0, bad, 3.0, 0.5])}, 0.5)
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        own_mask({"a": torch.ones(3)}, 1.0)


# Agreement


def test_agreement_is_that_of_sets():
    masks = random_masks(4, 3, density=0.4)
    live = {name: torch.rand((24, 40), generator=torch.Generator().manual_seed(7)) < 0.6 for name in matrix_names(3)}
    for task in masks.values():
        for name, alive in live.items():
            task[name] &= alive
    rows = {(row["layer"], row["kind"], tuple(row["tasks"])): row for row in agreement(masks, live)}
    sets = [*itertools.combinations(masks, 2), tuple(masks)]
    assert set(rows) == set(itertools.product(range(3), ("query", "output", "all"), sets))
    for (layer, kind, tasks), row in rows.items():
        mine = [n for n in matrix_names(3) if f".{layer}." in n and (kind == "all" or kind in n)]
        kept = [{(n, i) for n in mine for i in np.flatnonzero(masks[t][n].numpy())} for t in tasks]
        size = sum(int(live[n].sum()) for n in mine)
        iou = len(set.intersection(*kept)) / len(set.union(*kept))
        none, every = 1.0, 1.0
        for members in kept:
            none, every = none * (1 - len(members) / size), every * len(members) / size
        chance = every / (1 - none)
        assert row["iou"] == pytest.approx(iou)
        assert row["chance"] == pytest.approx(chance)
        assert row["beyond_chance"] == pytest.approx((iou - chance) / (1 - chance))
        assert row["low"] is row["high"] is None


def test_chance_is_what_independent_masks_of_a_density_overlap_by():
    density = 0.2
    (row,) = [r for r in agreement(random_masks(2, 1, shape=(1000, 500), density=density)) if r["kind"] == "all"]
    assert row["chance"] == pytest.approx(density / (2 - density), abs=2e-3)
    assert row["iou"] == pytest.approx(density / (2 - density), abs=2e-3)


def test_masks_without_a_choice_are_identical():
    def only(value):
        return {"layer.0.a.weight": torch.full((4, 4), value)}

    for value in (True, False):
        assert {row["beyond_chance"] for row in agreement({"s": only(value), "t": only(value)})} == {1.0}
    assert {row["iou"] for row in agreement({"s": only(True), "t": only(False)})} == {0.0}
    assert agreement({"alone": only(True)}) == []


def test_a_layer_without_a_live_weight_has_no_row():
    masks = random_masks(2, 3)
    live = {name: torch.full((24, 40), ".1." not in name) for name in matrix_names(3)}
    masks = {task: {name: mask & live[name] for name, mask in by.items()} for task, by in masks.items()}
    assert {row["layer"] for row in agreement(masks, live)} == {0, 2}
    assert {row["layer"] for row in keepers(masks, live)} == {0, 2}


# Watershed


def test_on_the_authors_curve_the_watershed_is_at_16():
    assert watershed(NYU_V2) == 16


@pytest.mark.parametrize(
    ("curve", "place"),
    [
        ([0.9, 0.9, 0.1, 0.1], 2),
        ([0.9, 0.1], 1),
        ([0.9, 0.9, 0.9, 0.1], 3),
        ([0.9, 0.2, 0.9, 0.5, 0.5], 3),  # the deeper fall is recovered
        ([0.9, 0.2, 0.6, 0.6], 1),  # and this one in part only
        ([0.9, 0.6, 0.3, 0.3], 1),  # the first of equals
        ([0.1, 0.5, 0.9], None),
        ([0.5] * 12, None),
        ([0.01, -0.02, 0.0, 0.01, -0.01], None),  # noise
        ([0.9], None),
        ([], None),
    ],
)
def test_the_watershed_is_the_largest_fall_that_is_never_recovered(curve, place):
    assert watershed(curve) == place


@settings(deadline=None)
@given(st.lists(st.floats(-0.2, 1), max_size=12))
def test_the_watershed_is_that_of_a_brute_force(curve):
    falls = [min(curve[i - 1] - later for later in curve[i:]) for i in range(1, len(curve))]
    largest = max(falls, default=0)
    assert watershed(curve) == (falls.index(largest) + 1 if largest >= 0.05 else None)


def test_the_interval_of_a_watershed_is_that_of_its_samples():
    curves = [[1, 1, 0, 0]] * 90 + [[1, 0, 0, 0]] * 6 + [[1, 1, 1, 1]] * 4
    assert watershed_interval(curves) == (1, 2, 0.96)
    assert watershed_interval([[0.5, 0.5]] * 3) == (None, None, 0.0)


@pytest.mark.parametrize("same", [1, 3, 5])
def test_masks_that_are_identical_below_a_layer_and_independent_above_have_their_watershed_there(same):
    masks = random_masks(3, 6, density=0.2)
    for name in matrix_names(6):
        if layer_and_kind([name])[name][0] < same:
            masks["t1"][name] = masks["t2"][name] = masks["t0"][name]
    layers, curve = by_layer(tally(masks))
    assert layers == list(range(6))
    assert curve[:same] == [1.0] * same and all(abs(value) < 0.1 for value in curve[same:])
    assert watershed(curve) == same


# Affinity


def test_shared_importance_is_the_overlap_of_two_distributions():
    scores = {
        "s": {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0])},
        "t": {"a": torch.tensor([0.0, 20.0]), "b": torch.tensor([60.0])},
    }
    assert shared_importance(scores) == [[1.0, 0.25], [0.25, 1.0]]
    assert shared_importance({"s": scores["s"], "none": {"a": torch.zeros(2), "b": torch.zeros(1)}})[0][1] == 0.0


def test_gradient_cosine_is_numpys():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(3, 60))
    gradients = {
        str(t): {"a": torch.tensor(v[:50]).reshape(5, 10), "b": torch.tensor(v[50:])} for t, v in enumerate(vectors)
    }
    gradients["zero"] = {"a": torch.zeros(5, 10), "b": torch.zeros(10)}
    expected = np.zeros((4, 4))
    expected[:3, :3] = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert np.allclose(gradient_cosine(gradients), expected)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_a_sketch_keeps_cosines_even_of_gradients_that_are_all_in_one_column(shape):
    draw = np.random.default_rng(0)
    common = draw.normal(size=shape)
    common[:, 1:] *= 1e-3
    tasks = {str(t): {"w": torch.tensor(common + t * draw.normal(size=shape) * np.abs(common))} for t in range(3)}
    exact = np.array(gradient_cosine(tasks))
    sketched = {task: sketch(by, width=4099) for task, by in tasks.items()}
    assert all(tensor.numel() == 4099 for by in sketched.values() for tensor in by.values())
    assert np.abs(np.array(gradient_cosine(sketched)) - exact).max() < 5 * 2 / math.sqrt(300)
    assert np.abs(exact[0, 1] - exact[0, 2]) > 0.1
    small = {"w": torch.arange(5.0)}
    assert torch.equal(sketch(small)["w"], small["w"])


def test_sketches_are_unbiased():
    a = {"w": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    b = {"w": torch.tensor([[-1.0, 0.5, 2.0], [0.0, 3.0, 1.0]])}
    products = [float(sketch(a, 2, s)["sketch"] @ sketch(b, 2, s)["sketch"]) for s in range(2000)]
    error = np.std(products) / math.sqrt(len(products))
    assert abs(np.mean(products) - float((a["w"] * b["w"]).sum())) < 4 * error


# Who keeps what


def test_keepers_count_the_tasks_of_every_weight():
    masks = random_masks(3, 2, density=0.5)
    for row in keepers(masks):
        mine = [n for n in matrix_names(2) if f".{row['layer']}." in n and (row["kind"] == "all" or row["kind"] in n)]
        votes = [sum(int(m[n].flatten()[i]) for m in masks.values()) for n in mine for i in range(960)]
        assert row["kept_by"] == pytest.approx([votes.count(v) / len(votes) for v in range(4)])


def test_planted_heads_and_neurons_serve_the_tasks_that_they_were_planted_for():
    sites = {
        "head": {
            f"layer.{i}.attention": Site(
                3, {f"layer.{i}.q": (0, torch.arange(6) // 2), f"layer.{i}.o": (1, torch.arange(6) // 2)}
            )
            for i in range(2)
        },
        "neuron": {"layer.0.up": Site(4, {"layer.0.up": (0, torch.arange(4))})},
    }
    sites["neuron"]["layer.1.up"] = Site(4, {"layer.1.up": (0, torch.arange(4))})  # not among the scores
    wanted = {"s": {(0, 0), (0, 1), (1, 2)}, "t": {(0, 0), (1, 0), (1, 1)}}
    scores = {}
    for task, heads in wanted.items():
        scores[task] = {f"layer.{i}.{m}.weight": torch.full((6, 6), 1e-3) for i in range(2) for m in "qo"}
        for layer, head in heads:
            scores[task][f"layer.{layer}.q.weight"][2 * head : 2 * head + 2] = 1.0
        scores[task]["layer.0.up.weight"] = torch.diag(
            torch.tensor([1.0, 2.0, 3.0, 0.0] if task == "s" else [3.0, 2.0, 1.0, 0.0])
        )
    found = parts({task: part_scores(by, sites) for task, by in scores.items()}, sparsity=0.5)
    assert found[0] == {
        "layer": 0,
        "granularity": "head",
        "count": 3,
        "kept_by_task": {"s": 2, "t": 1},
        "kept_by": [1, 1, 1],
        "heads": [["s", "t"], ["s"], []],
    }
    assert found[1]["heads"] == [["t"], ["t"], ["s"]]
    # no task needs one of the four neurons, which is gone: half of three is 1 (round(1.5) = 2 go)
    assert found[2:] == [
        {"layer": 0, "granularity": "neuron", "count": 4, "kept_by_task": {"s": 1, "t": 1}, "kept_by": [2, 2, 0]}
    ]

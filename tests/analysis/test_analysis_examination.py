"""All measures of an examination and their intervals, against planted truths, fresh draws and single measures."""

import random

import numpy as np
import pytest
import torch

from hf_disparse.analysis import (
    Examination,
    Sampled,
    agreement,
    bootstrap,
    draw_sample,
    gradient_cosine,
    keepers,
    own_mask,
    shared_importance,
    take,
    tally,
    with_intervals,
)
from hf_disparse.model.architectures import find_sites
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.pruning.scores import disparse, gradients
from tests.helpers.analyses import matrix_names, planted_gradients, random_masks
from tests.helpers.tiny import tiny_model

torch.set_num_threads(1)


# Intervals


def examined(stream, sparsity=0.8, **keywords) -> Examination:
    stream = list(stream)
    weights = {name: torch.ones_like(gradient) for name, gradient in stream[0][1][0].items()}
    exam = Examination(weights, "snip", sparsity, **keywords)
    for _ in exam.watch(stream):
        pass
    return exam


def test_a_planted_watershed_is_found_with_an_interval_around_it():
    measures = examined(planted_gradients(3, 5, same=2)).measures(draws=40)
    found = measures["watershed"]
    assert found["layer"] == 2 and found["low"] == found["high"] == 2 and found["share"] == 1.0
    for row in measures["agreement"]:
        assert row["low"] <= row["beyond_chance"] <= row["high"] <= 1
        if row["layer"] < 2:
            assert row["low"] > 0.6


def test_random_masks_agree_by_0_within_the_interval():
    measures = examined(planted_gradients(3, 8, same=0, n=2500)).measures(draws=100)
    assert measures["watershed"]["layer"] is None
    whole = [row for row in measures["agreement"] if row["kind"] == "all"]
    assert len(whole) == 8 * 4
    inside = sum(row["low"] <= 0 <= row["high"] for row in whole)
    assert inside >= 28, f"{inside} of 32 intervals of 95 % hold 0"
    assert all(row["high"] - row["low"] < 0.2 for row in whole)


def test_an_interval_is_as_wide_as_measuring_anew_spreads():
    """Independent masks: the spread of agreement over fresh draws, against the width of one draw's interval."""
    fresh = [
        row["beyond_chance"]
        for seed in range(60)
        for row in agreement(random_masks(2, 1, seed, (40, 50), 0.2))
        if row["kind"] == "all"
    ]
    widths = []
    for seed in range(6):
        measures = examined(planted_gradients(2, 1, same=0, n=2000, seed=seed)).measures(draws=200)
        widths += [row["high"] - row["low"] for row in measures["agreement"] if row["kind"] == "all"]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(fresh), rel=0.35)


def test_intervals_are_wider_where_batches_disagree():
    draw = np.random.default_rng(0)
    mean = draw.exponential(size=3000) ** 2

    def noisy(sigma):
        for t in "ab":
            yield (
                t,
                [{"layer.0.w.weight": torch.tensor(mean * draw.lognormal(0, sigma, 3000)).float()} for _ in range(4)],
            )

    narrow, wide = (examined(noisy(sigma)).measures(draws=60)["agreement"][0] for sigma in (0.01, 1.0))
    assert wide["beyond_chance"] < 0.95 < narrow["beyond_chance"]
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]


def test_the_same_seed_draws_the_same_bits():
    one, again, other = (examined(planted_gradients(2, 3, same=1), sample=3000, seed=s).measures(20) for s in (1, 1, 2))
    assert one == again
    assert [row["low"] for row in one["agreement"]] != [row["low"] for row in other["agreement"]]
    assert [row["iou"] for row in one["agreement"]] == [row["iou"] for row in other["agreement"]]  # of all weights


def test_a_sample_is_the_same_share_of_what_is_live_in_every_matrix():
    live = {"layer.0.a.weight": torch.ones(100, 100, dtype=torch.bool), "layer.0.b.weight": torch.zeros(50, 100).bool()}
    live["layer.0.b.weight"][:10] = True
    sample = draw_sample(live, 1100, seed=3)
    assert {name: len(where) for name, where in sample.items()} == {"layer.0.a.weight": 1000, "layer.0.b.weight": 100}
    for name, where in sample.items():
        assert live[name].flatten()[where].all() and len(set(where.tolist())) == len(where)
        assert torch.equal(take({name: torch.arange(live[name].numel())}, {name: where})[name], where.float())
    everything = draw_sample(live, 10**9)
    assert all(torch.equal(where, live[name].flatten().nonzero().squeeze(1)) for name, where in everything.items())


def test_a_bootstrap_of_one_batch_on_all_weights_centres_on_the_agreement():
    draw = np.random.default_rng(1)
    stream = {
        f"t{t}": {n: torch.tensor(draw.exponential(size=3000)).float() for n in matrix_names(2)} for t in range(2)
    }
    samples = {
        t: Sampled({n: g.unsqueeze(0) for n, g in by.items()}, {n: torch.ones(3000) for n in by}, lambda w, s: w * s)
        for t, by in stream.items()
    }
    counts = tally({t: own_mask(by, 0.7) for t, by in stream.items()})
    drawn = bootstrap(samples, 0.7, draws=300)
    rows, _ = with_intervals(counts, drawn)
    assert drawn.shape == (300, 6, 1)
    for row, centre in zip(rows, drawn.mean(0).flatten().tolist(), strict=True):
        assert row["beyond_chance"] == pytest.approx(centre, abs=0.01)


def test_a_matrix_with_one_weight_left_is_in_every_draw():
    def stream():
        draw = np.random.default_rng(0)
        for t in "st":
            yield (
                t,
                [{name: torch.tensor(draw.exponential(size=n)).float() for name, n in sizes.items()} for _ in range(3)],
            )

    sizes = {"layer.0.a.weight": 1, "layer.0.b.weight": 300, "layer.1.a.weight": 300}
    measures = examined(stream()).measures(draws=30)
    assert len(measures["agreement"]) == 5
    assert {row["kind"] for row in measures["agreement"]} == {"a", "b", "all"}


# A model


def test_an_examination_measures_what_its_parts_say_on_a_model():
    model = tiny_model()
    draw = random.Random(0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)

    def batch(task, labels):
        ids = torch.tensor([[draw.randrange(4, 44) for _ in range(6)] for _ in range(4)])
        return {"input_ids": ids, "labels": labels, "task": task}

    loaders = {
        "two": [batch("two", torch.tensor([0, 1, 0, 1])) for _ in range(3)],
        "three": [batch("three", torch.tensor([0, 1, 2, 1])) for _ in range(3)],
        "real": [batch("real", torch.rand(4)) for _ in range(3)],
    }
    weights = prunable_parameters(model)
    sites = find_sites(model.encoder, "encoder.")
    sites = {kind: sites[kind] for kind in ("head", "neuron")}
    exam = Examination(weights, "disparse", 0.75, sites)
    scores = dict(exam.watch(gradients(model, loaders, parameters=weights)))
    found = exam.measures(draws=10)
    summed, expected = {}, {}
    for task, batches in loaders.items():
        model.zero_grad()
        absolute = {name: torch.zeros_like(w) for name, w in weights.items()}
        for inputs in batches:
            before = {n: 0 if w.grad is None else w.grad.clone() for n, w in weights.items()}
            model.eval()(**inputs).loss.backward()
            for name, w in weights.items():
                absolute[name] += (w.grad - before[name]).abs()
        summed[task] = {name: w.grad.clone() for name, w in weights.items()}
        expected[task] = {name: disparse(w.detach(), absolute[name]) for name, w in weights.items()}
        for name in weights:
            assert torch.allclose(scores[task][name], expected[task][name], rtol=1e-2, atol=1e-7)
    masks = {task: own_mask(by, 0.75) for task, by in scores.items()}
    shown = [{**row, "low": None, "high": None} for row in found["agreement"]]
    assert shown == agreement(masks) and len(shown) == 2 * 7 * 4
    assert found["keepers"] == keepers(masks)
    assert np.allclose(found["affinity"]["importance"], shared_importance(expected), atol=1e-3)
    assert np.allclose(found["affinity"]["gradient_cosine"], gradient_cosine(summed), atol=1e-3)
    assert [(row["layer"], row["granularity"], row["count"]) for row in found["parts"]] == [
        (0, "head", 2), (1, "head", 2), (0, "neuron", 32), (1, "neuron", 32),
    ]  # fmt: skip
    assert sum(row["kept_by_task"]["two"] for row in found["parts"] if row["granularity"] == "neuron") == 16


def test_zeros_are_left_out_of_a_sparse_model_s_measures():
    stream = list(planted_gradients(2, 3, same=0))
    keep = {name: torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.3 for name in matrix_names(3)}
    exam = Examination({name: mask.float() for name, mask in keep.items()}, "snip", 0.5)
    scores = dict(exam.watch(stream))
    for task, seen in exam.evidence.items():
        live = sum(int(mask.sum()) for mask in keep.values())
        kept = torch.cat([mask for mask in seen.keep.values()])
        assert int(kept.sum()) == live - round(0.5 * live)
        assert not (kept & ~torch.cat(list(keep.values()))).any()
        assert all((scores[task][name] == 0).equal(~keep[name]) for name in keep)
    found = exam.measures(draws=10)
    whole = [row for row in found["agreement"] if row["kind"] == "all"]
    assert all(abs(row["beyond_chance"]) < 0.1 for row in whole)  # and not 1: what both prune is not agreement
    assert all(row["kept_by"][0] == pytest.approx(0.25, abs=0.05) for row in found["keepers"])

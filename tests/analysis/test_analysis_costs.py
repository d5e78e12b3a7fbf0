"""Cost curves, knees and footprints against counts by hand."""

import copy

import torch
from safetensors.torch import load_file
from torch import nn

from hf_disparse import apply_masks, decide, find_masks, prunable_parameters, save_packed
from hf_disparse.analysis import cost_curve, footprint, knee, masks_at
from tests.helpers.tiny import tiny_model

torch.set_num_threads(1)


def test_masks_of_one_set_of_costs_are_the_decisions_and_lie_within_each_other():
    generator = torch.Generator().manual_seed(0)
    scores = {
        t: {"a": torch.rand(6, 7, generator=generator), "b": torch.rand(30, generator=generator)} for t in ("s", "t")
    }
    ranks = {
        t: torch.cat([s.flatten() for s in by.values()]).argsort(descending=True).argsort() for t, by in scores.items()
    }
    best = torch.minimum(*ranks.values())
    costs = {"a": best[:42].reshape(6, 7), "b": best[42:]}
    before = None
    for sparsity in (0.0, 0.3, 0.55, 0.9):
        masks = masks_at(costs, sparsity)
        assert all(torch.equal(masks[name], keep) for name, keep in decide(scores, sparsity).items())
        assert before is None or all((before[name] | ~masks[name]).all() for name in masks)
        before = masks


def measured(values: dict[float, dict], asked: list):
    def measure(sparsity, recovered):
        asked.append((sparsity, recovered))
        return {task: value + (2.0 if recovered else 0.0) for task, value in values[sparsity].items()}

    return measure


VALUES = {0.0: {"s": 90, "t": 80}, 0.5: {"s": 89, "t": 80}, 0.8: {"s": 86, "t": 79}, 0.9: {"s": 60, "t": 78}}


def test_a_curve_has_every_sparsity_once_from_0_upwards():
    asked = []
    curve = cost_curve(measured(VALUES, asked), [0.9, 0.5, 0.8, 0.5])
    assert asked == [(0.0, False), (0.5, False), (0.8, False), (0.9, False)]
    assert [point["average"] for point in curve["points"]] == [85, 84.5, 82.5, 69]
    assert curve["within"] is None and curve["denominator"] == "prunable weights"
    assert curve["knee"]["s"] == 0.8 and curve["knee"]["average"] == 0.8


def test_a_curve_stops_at_the_first_sparsity_that_costs_a_task_too_much():
    asked = []
    curve = cost_curve(measured(VALUES, asked), [0.5, 0.8, 0.9], within=2)
    assert curve["within"] == {"points": 2, "sparsity": 0.5}
    assert asked[-1] == (0.8, False)
    asked = []
    curve = cost_curve(
        measured(VALUES, asked), [0.5, 0.8, 0.9], within=2, recover=True
    )  # recovery brings two points back
    assert curve["within"] == {"points": 2, "sparsity": 0.8}
    assert asked[-2:] == [(0.9, False), (0.9, True)]
    curve = cost_curve(measured({0.0: {"s": 50}, 0.5: {"s": 10}}, []), [0.5], within=1)
    assert curve["within"]["sparsity"] == 0.0


def test_the_knee_is_where_the_curve_is_furthest_above_its_chord():
    x = [i / 10 for i in range(10)]
    assert knee(x, [90 - 40 * max(0, a - 0.6) for a in x]) == 0.6  # flat, then a slope
    assert knee(x, [90.0] * 10) is None
    assert knee(x, [90 + a for a in x]) is None
    assert knee(x, [90 - 0.9 * a for a in x]) is None  # less than a point
    assert knee([0.0, 0.5, 1.0], [90, 70, 50]) is None  # straight
    assert knee([0.0, 0.5, 1.0], [90, 50, 49]) is None  # below its chord
    assert knee([0.0, 0.9], [90, 10]) is None


def test_a_footprint_is_that_of_a_model_counted_by_hand():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4), nn.LayerNorm(4))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, :3] = 1.0
        model[1].bias.fill_(1.0)
        model[0].weight.fill_(1.0)
    one, two, three = footprint(model)
    assert one == {
        "module": "0", "parameters": 80, "nonzeros": 80, "bytes_dense": 320, "bytes_packed": 320,
        "multiplications": 0, "multiplications_left": 0,
    }  # fmt: skip
    assert two == {
        "module": "1", "parameters": 36, "nonzeros": 7, "bytes_dense": 144, "bytes_packed": 16 + 3 * 4 + 4,
        "multiplications": 32, "multiplications_left": 3,
    }  # fmt: skip
    assert three["module"] == "2" and (three["parameters"], three["nonzeros"]) == (8, 4)


def test_a_shared_matrix_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert [row["module"] for row in footprint(model)] == ["0"]


def test_the_packed_bytes_are_those_of_the_file_that_is_written(tmp_path):
    model = tiny_model()
    weights = prunable_parameters(model)
    apply_masks(model, find_masks({n: torch.rand_like(p).ge(0.9).float() for n, p in weights.items()}))
    rows = footprint(copy.deepcopy(model))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    save_packed(model, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    parameters = {name for name, _ in model.named_parameters()}
    written = sum(t.nbytes for name, t in stored.items() if name.removesuffix("_bitmask") in parameters)
    assert sum(row["bytes_packed"] for row in rows) == written
    assert sum(row["bytes_dense"] for row in rows) == sum(p.nbytes for p in model.parameters()) > written

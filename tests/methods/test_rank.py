"""Rank pruning: two factors give the outputs of one matrix, the budget is met, and what is pruned really leaves."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_disparse import (
    MultitaskModel,
    RankConfig,
    UserError,
    compact,
    factorise,
    find_masks,
    prunable_parameters,
    save_compact,
    save_packed,
    save_tasks,
    sparsity_report,
    task_model,
)
from hf_disparse.methods import Update
from hf_disparse.methods.rank import Rank, fill_budget, parameter_budget, score_per_parameter
from hf_disparse.model.factorise import multiply_out
from hf_disparse.model.low_rank import LowRankLinear, factors, low_rank_modules, rank_sites
from hf_disparse.model.sparsity import dense_size
from hf_disparse.pruning.masks import apply_masks
from hf_disparse.pruning.parts import Site, mask_of_parts
from hf_disparse.pruning.scores import score
from tests.helpers.commands import hf_disparse, write_inputs, write_recipe
from tests.helpers.compacting import BATCH, close, logits, model_of, prune_parts, same
from tests.helpers.tiny import CONFIGS, DENSE, three_tasks, tiny_model
from tests.helpers.training import assert_same


def prune_ranks(model, seed: int = 0) -> int:
    """Zeroes random components, a different number of each matrix; returns how many stay."""
    generator, stay = torch.Generator().manual_seed(seed), 0
    masks = find_masks({n: torch.ones_like(p) for n, p in model.base_model.named_parameters() if p.ndim == 2})
    for i, site in enumerate(rank_sites(model.base_model).values()):
        keep = torch.zeros(site.parts, dtype=torch.bool)
        keep[torch.randperm(site.parts, generator=generator)[: 1 + i % max(site.parts - 1, 1)]] = True
        masks |= mask_of_parts(masks, site, keep)
        stay += int(keep.sum())
    apply_masks(model.base_model, masks)
    return stay


# Factors


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_factors_are_numpys_singular_vectors_times_the_roots_of_the_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    down, up = factors(weight)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert down.shape == (5 if 5 in shape else 8, shape[1]) and up.shape == (shape[0], len(values))
    torch.testing.assert_close(up @ down, weight, atol=1e-6, rtol=1e-6)
    for factor in (down @ down.T, up.T @ up):  # orthogonal, and as long as the values say
        np.testing.assert_allclose(factor.numpy(), np.diag(values), atol=1e-5)
    best = np.linalg.norm(values[3:])  # Eckart and Young: no matrix of rank 3 is closer
    assert float(torch.linalg.norm(weight - up[:, :3] @ down[:3])) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_outputs_stay_when_matrices_become_two(model_type):
    model = model_of(model_type)
    expected, prunable = logits(model), prunable_parameters(model)
    heads = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    assert len(factorise(model)) == len(prunable) == len(low_rank_modules(model))
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert_same(heads, dict(model.heads.state_dict()))
    assert len(prunable_parameters(model)) == 2 * len(prunable)
    assert dense_size(model, prunable_parameters(model).values()) == sum(p.numel() for p in prunable.values())
    assert factorise(model) == [], "once is enough"
    multiply_out(model)
    assert not low_rank_modules(model) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)


def test_a_factorised_module_keeps_what_the_linear_one_was():
    model = tiny_model().to(torch.bfloat16).eval()
    first = "encoder.layer.0.attention.self.query"
    model.encoder.get_submodule(first).weight.requires_grad_(False)
    assert factorise(model, RankConfig(target_modules=["query"])) == [first, first.replace("0", "1")]
    module = model.encoder.get_submodule(first)
    assert module.up.weight.dtype == torch.bfloat16 and not module.training
    assert not module.up.weight.requires_grad and module.bias.requires_grad
    names = list(prunable_parameters(model, RankConfig(target_modules=["query"])))
    assert names == [
        f"encoder.encoder.layer.{i}.attention.self.query.{f}.weight" for i in (0, 1) for f in ("down", "up")
    ]


# The budget


def greedy(cost, sizes, budget):
    keep, left = [False] * len(cost), budget
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], i)):
        if sizes[i] <= left:
            keep[i], left = True, left - sizes[i]
    return keep


@pytest.mark.parametrize("seed", range(20))
def test_components_are_taken_in_order_while_they_fit(seed):
    generator = np.random.default_rng(seed)
    cost, sizes = generator.integers(0, 30, 40), generator.integers(1, 20, 40)
    budget = int(generator.integers(0, sizes.sum() + 10))
    kept = fill_budget(torch.from_numpy(cost), torch.from_numpy(sizes), budget)
    assert kept.tolist() == greedy(cost.tolist(), sizes.tolist(), budget)
    spent = sizes[kept.numpy()].sum()
    assert spent <= budget and all(spent + size > budget for size in sizes[~kept.numpy()])


def test_the_budget_counts_the_numbers_of_the_dense_matrices():
    assert parameter_budget([(4, 6), (3, 3)], 0.9) == 33 - 30
    assert parameter_budget([(10, 100)], 0.9) == 100  # and not 99, which 1 - 0.9 would give
    site = Site(2, {"m.down": (0, torch.arange(2)), "m.up": (1, torch.arange(2))})
    scores = {"m.down.weight": torch.tensor([[1.0, 2, 3], [0, 0, 1]]), "m.up.weight": torch.tensor([[4.0, 0], [0, 2]])}
    assert score_per_parameter(scores, site).tolist() == [10 / 5, 3 / 5]


@pytest.mark.parametrize("decision", ["unanimous", "quorum", "joint", "mean_rank"])
def test_the_decision_is_that_of_a_brute_force_over_components(decision):
    """Each task ranks components by their score per parameter; the best of each matrix stays; the rest while it fits."""
    model, quorum = tiny_model(), 2 if decision == "quorum" else 1
    factorise(model)
    config = RankConfig(sparsity=0.6, decision=decision, quorum=quorum)
    parameters, sites = prunable_parameters(model), rank_sites(model)
    generator = torch.Generator().manual_seed(0)
    tasks = ["joint"] if decision == "joint" else ["a", "b", "c"]
    stream = [(t, {n: torch.rand(p.shape, generator=generator) for n, p in parameters.items()}) for t in tasks]
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters.items()}
    now = Update(0, parameters, masks, {"rank": sites}, lambda *_: iter(stream), None)
    decided = Rank(config).update(now)

    def cost(components, values):  # values: task -> (component -> worth)
        ranks = []
        for task in tasks:
            order = sorted(components, key=lambda c: -values[task][c])
            ranks.append({c: i for i, c in enumerate(order)})
        if decision == "mean_rank":
            return {c: sum(r[c] for r in ranks) for c in components}
        return {c: sorted(r[c] for r in ranks)[quorum - 1] for c in components}

    values, size, order = {t: {} for t in tasks}, {}, []
    for name in sites:
        down, up = (parameters[f"{name}.{f}.weight"] for f in ("down", "up"))
        for i in range(len(down)):
            order.append((name, i))
            size[name, i] = down.shape[1] + up.shape[0]
            for task, scores in stream:
                total = (
                    scores[f"{name}.down.weight"][i].double().sum() + scores[f"{name}.up.weight"][:, i].double().sum()
                )
                values[task][name, i] = float(total) / size[name, i]
    kept = set()
    for name in sites:
        costs = cost([c for c in order if c[0] == name], values)
        kept.add(min(costs, key=lambda c: (costs[c], c[1])))
    rest = [c for c in order if c not in kept]
    costs, left = cost(rest, values), DENSE - round(0.6 * DENSE) - sum(size[c] for c in kept)
    chosen = greedy([costs[c] for c in rest], [size[c] for c in rest], left)
    kept |= {c for c, stays in zip(rest, chosen, strict=True) if stays}
    for name, i in order:
        assert bool(decided[f"{name}.down.weight"][i].all()) == ((name, i) in kept)
        assert bool(decided[f"{name}.up.weight"][:, i].any()) == ((name, i) in kept)


def test_every_task_has_scores_of_its_own():
    model = tiny_model().eval()
    factorise(model)
    parameters, sites = prunable_parameters(model), rank_sites(model)
    labels = {"two": torch.tensor([0, 1]), "real": torch.tensor([0.1, 0.9])}
    loaders = {task: [{**BATCH, "task": task, "labels": labels[task]}] for task in labels}
    name, site = next(iter(sites.items()))
    for task, scores in score(model, loaders, "snip", parameters=parameters):
        model.zero_grad()
        model(**loaders[task][0]).loss.backward()
        down, up = (parameters[f"{name}.{f}.weight"] for f in ("down", "up"))
        expected = (down * down.grad).abs().sum(1) + (up * up.grad).abs().sum(0)
        torch.testing.assert_close(score_per_parameter(scores, site).float(), expected / (16 + 16))


# Compaction and files


@pytest.mark.parametrize("model_type", CONFIGS)
def test_pruned_components_leave_the_model_and_outputs_stay(model_type, tmp_path):
    model = model_of(model_type)
    before = sum(p.numel() for p in prunable_parameters(model).values())
    factorise(model)
    stay = prune_ranks(model)
    expected, report = logits(model), sparsity_report(model, model.encoder, prunable_parameters(model))
    model.save_pretrained(tmp_path / "masked")
    same(MultitaskModel.from_pretrained(tmp_path / "masked").eval(), model)
    assert compact(model)["rank"][1] == stay
    close(logits(model), expected)
    now = sum(p.numel() for p in prunable_parameters(model).values())
    assert now == sum(m.rank * (m.in_features + m.out_features) for m in low_rank_modules(model).values()) < before
    assert sparsity_report(model, model.encoder, prunable_parameters(model)) == report, "the same before and after"
    assert report["prunable"] == (before - now) / before
    model.save_pretrained(tmp_path / "compact")
    assert (
        sum(t.numel() for n, t in load_file(tmp_path / "compact" / "model.safetensors").items() if ".up." in n) < before
    )
    again = AutoModel.from_pretrained(tmp_path / "compact").eval()
    same(again, model)
    again.train()(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    new = MultitaskModel.from_encoder(str(tmp_path / "compact"), three_tasks()[:1]).eval()
    close(new.encoder(**BATCH)[0], model.encoder(**BATCH)[0])


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "modernbert"])
def test_heads_neurons_and_layers_of_a_factorised_model_go_too(model_type, tmp_path):
    model = model_of(model_type)
    factorise(model)
    prune_ranks(model)
    stay = prune_parts(model)
    model.skip_layers([1])
    expected = logits(model)
    counts = save_compact(model, tmp_path / "compact")
    assert counts["layer"] == (3, 2) and counts["head"][1] < stay["head"]
    again = MultitaskModel.from_pretrained(tmp_path / "compact").eval()
    close(logits(again), expected)
    assert set(again.config.quantization_config.structure) >= {"heads", "ranks"}


def test_an_optimizer_goes_along():
    model = tiny_model().eval()
    factorise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    prune_ranks(model)
    compact(model, optimizer)
    assert all(s["exp_avg"].shape == p.shape for p, s in optimizer.state.items())


@pytest.fixture
def pruned():
    model = model_of("bert")
    factorise(model)
    prune_ranks(model)
    return model


@pytest.mark.parametrize("small", [False, True])
def test_a_packed_file_comes_back(small, pruned, tmp_path):
    if small:
        compact(pruned)
        prune_ranks(pruned, seed=1)
    pruned.save_pretrained(tmp_path / "plain")
    for name, source in (("model", pruned), ("folder", tmp_path / "plain")):
        assert save_packed(source, tmp_path / name)["matrices"] > 0
        same(MultitaskModel.from_pretrained(tmp_path / name).eval(), pruned)


@pytest.mark.parametrize("skipped", [[], [1]])
def test_a_task_is_exported_in_plain_matrices(skipped, pruned, tmp_path):
    compact(pruned)
    pruned.skip_layers(skipped)
    expected = pruned(**BATCH, task="three").logits
    torch.testing.assert_close(task_model(pruned, "three")(**BATCH).logits, expected, atol=2e-5, rtol=1e-4)
    assert low_rank_modules(pruned), "a copy is multiplied out, not the model"
    save_tasks(pruned, tmp_path / "task", "three")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "task").eval()
    torch.testing.assert_close(plain(**BATCH).logits, expected, atol=2e-5, rtol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "task" / "config.json").read_text())


@pytest.mark.slow
def test_without_the_package_loading_stops(tmp_path):
    """And does not make up weights, which it would where it finds no tensor of a matrix's name."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()).eval()
    factorise(model)
    with torch.no_grad():
        expected = model(**BATCH).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        close(again(**BATCH).logits, expected)
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "size" in done.stderr


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "ranks",
    [
        {QUERY: 17},
        {QUERY: 2**40},
        {QUERY: 0},
        {QUERY: -1},
        {QUERY: True},
        {QUERY: "4"},
        {QUERY: 4.0},
        {QUERY: [4]},
        {QUERY: 4, f"{QUERY}.down": 2},
        {"encoder.layer.9.attention.self.query": 2},
        {"encoder.layer.0.attention.self": 2},
        {"embeddings.word_embeddings": 2},
        {"": 2},
        {"../../config": 2},
        [QUERY],
        "query",
        {"embeddings": 1},
    ],
)
def test_a_structure_that_does_not_fit_is_refused(ranks, pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["structure"]["ranks"] = ranks
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantization_config\.structure: expected"):
        MultitaskModel.from_pretrained(tmp_path)


def test_a_structure_of_other_weights_is_refused(pruned, tmp_path):
    """Another rank than the file has, and factors that it has not: transformers would make those up."""
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["structure"]["ranks"][QUERY] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UserError, RuntimeError), match=r"expected shape|mismatched"):
        MultitaskModel.from_pretrained(tmp_path)
    config["quantization_config"]["structure"]["ranks"][QUERY] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "model.safetensors")
    stored.pop(f"encoder.{QUERY}.down.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"'{QUERY}' has a rank, but model.safetensors has no"):
        MultitaskModel.from_pretrained(tmp_path)


def test_what_is_in_two_factors_counts_as_the_matrix_that_it_was():
    model = nn.Sequential(LowRankLinear(6, 2, 4), nn.Linear(4, 3))
    nn.init.ones_(model[0].down.weight), nn.init.ones_(model[0].up.weight), nn.init.ones_(model[1].weight)
    prunable = {"a": model[0].down.weight, "b": model[0].up.weight}
    assert sparsity_report(model, model, prunable)["prunable"] == (24 - 20) / 24
    model[0].down.weight.data[1], model[0].up.weight.data[:, 1] = 0, 0
    assert sparsity_report(model, model, prunable)["prunable"] == (24 - 10) / 24
    assert dense_size(model, model.parameters()) == 6 * 4 + 4 + 4 * 3 + 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rank", "flop"])
def test_a_recipe_runs_from_the_shell_to_a_compact_folder(method, tmp_path):
    schedule = {"score_batches": 2} if method == "rank" else {"end_step": 2}
    recipe = write_inputs(tmp_path) | {"pruning": {"method": method, "sparsity": 0.6, **schedule}}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "run"
    status, out, error = hf_disparse("train", path, "--dry-run")
    assert status == 0 and f"{DENSE:,}" in out, error
    assert hf_disparse("train", path, "--no-analysis")[0] == 0
    results = json.loads((run / "results.json").read_text())
    assert 0.6 - 1e-3 <= results["sparsity"]["prunable"] < 0.6 + 48 / DENSE
    status, out, error = hf_disparse("export", run, "--format", "compact", "--output_dir", tmp_path / "small")
    assert status == 0 and "of 192 ranks" in out, error
    assert f"{100 * results['sparsity']['prunable']:.1f} %" in (tmp_path / "small" / "README.md").read_text()
    before, after = (
        json.loads(hf_disparse("evaluate", f, "--recipe", path, "--json")[1]) for f in (run, tmp_path / "small")
    )
    assert before["sparsity"] == after["sparsity"] and before["tasks"] == after["tasks"]
    dense = json.loads(hf_disparse("evaluate", run / "dense", "--recipe", path, "--json")[1])
    assert dense["sparsity"]["prunable"] == 0, "what is only evaluated is not factorised"

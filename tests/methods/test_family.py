"""A family that changes: decisions anew from stored scores, a new head, and the vote of the nearest tasks."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from hf_disparse import (
    DisparseTrainer,
    MultitaskModel,
    TaskConfig,
    UserError,
    decide,
    decide_again,
    decide_max,
    decide_mean_rank,
    decide_sum,
    find_masks,
    prunable_parameters,
    prune_again,
    unshare,
    vote_masks,
)
from hf_disparse.methods.again import majority, rank_correlation
from hf_disparse.pruning.schedule import sparsity_at, update_steps
from hf_disparse.pruning.stored_scores import keep_scores, load_scores, scored_tasks
from tests.helpers.resuming import CUBIC
from tests.helpers.tiny import three_datasets, three_tasks, tiny_model, tiny_tokenizer
from tests.helpers.training import SCORED, arguments, assert_same, count_pruned, saved_run, weights

NEW = TaskConfig(name="new", columns="text", labels=["no", "yes"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, saved_run(folder)


def batches(task: str, number: int = 4) -> list[dict]:
    rows = three_datasets()[task]
    found = []
    for i in range(number):
        part = [rows[j] for j in range(4 * i, 4 * i + 4)]
        size = max(len(row["input_ids"]) for row in part)
        ids = torch.tensor([row["input_ids"] + [0] * (size - len(row["input_ids"])) for row in part])
        found.append(
            {
                "input_ids": ids,
                "attention_mask": (ids != 0).long(),
                "labels": torch.tensor(rows["labels"][4 * i : 4 * i + 4]),
            }
        )
    return found


def rewrite(path: Path, change, **metadata) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def broken(finished, tmp_path):
    """A copy of the run that a test may spoil."""
    finished[1].save_model(str(tmp_path / "copy"))
    return tmp_path / "copy"


# Decisions anew


@pytest.mark.parametrize(
    "config",
    [
        *(replace(SCORED, decision=decision) for decision in ("unanimous", "sum", "max", "mean_rank")),
        replace(SCORED, decision="quorum", quorum=2),
        *(replace(CUBIC, keep_scores=True, decision=decision) for decision in ("unanimous", "max")),
        replace(CUBIC, keep_scores=True, criterion="random"),
        replace(SCORED, granularity=("head", "neuron"), sparsity=0.5),
        replace(SCORED, granularity="2:4", sparsity=0.5),
        replace(SCORED, granularity="block4x4", sparsity=0.5),
    ],
    ids=lambda c: f"{c.decision}-{c.schedule}-{c.criterion}-{'-'.join(c.granularity)}",
)
def test_all_tasks_decide_again_as_the_run_did_bit_for_bit(tmp_path, config):
    trainer = saved_run(tmp_path, config, max_steps=17 if config.schedule == "cubic" else 2)
    assert_same(trainer.pruner.masks, decide_again(tiny_model(), tmp_path))


@pytest.mark.parametrize("decision", ["unanimous", "sum", "max", "mean_rank"])
def test_what_was_pruned_before_the_tasks_scored_does_not_compete(tmp_path, decision):
    generator = torch.Generator().manual_seed(0)
    parameters = prunable_parameters(tiny_model())
    masks = {n: torch.rand(p.shape, generator=generator) > 0.5 for n, p in parameters.items()}
    drawn = {  # with zeros and ties
        task: {n: torch.rand(p.shape, generator=generator).mul(9).floor() for n, p in parameters.items()}
        for task in "abc"
    }
    config = replace(SCORED, decision=decision)
    config.save_pretrained(tmp_path)
    assert dict(keep_scores(drawn.items(), tmp_path / "scores", masks)) == drawn  # what is handed on is not marked
    rule = {"unanimous": decide, "sum": decide_sum, "max": decide_max, "mean_rank": decide_mean_rank}[decision]
    expected = rule(drawn, 0.7, active=masks)
    assert all((expected[name] <= keep).all() for name, keep in masks.items())
    assert_same(expected, decide_again(tiny_model(), tmp_path))
    stored, held = load_scores(tmp_path / "scores" / "b.safetensors", parameters)
    assert_same(drawn["b"], stored)
    assert_same(masks, held)


def test_a_run_in_steps_marks_what_it_had_pruned_before(tmp_path):
    saved_run(tmp_path, replace(CUBIC, keep_scores=True), max_steps=17)
    parameters = prunable_parameters(tiny_model())
    size, last_but_one = sum(p.numel() for p in parameters.values()), sparsity_at(CUBIC, update_steps(CUBIC)[-2])
    for path in scored_tasks(tmp_path).values():
        assert count_pruned(load_scores(path, parameters)[1]) == round(last_but_one * size)


def test_without_a_task_the_masks_are_those_of_a_run_without_it(finished, tmp_path):
    folder, _ = finished
    for gone in ("two", "real"):
        rest = [task for task in three_datasets() if task != gone]
        expected = saved_run(tmp_path / gone, tasks=rest, max_steps=1).pruner.masks
        found = decide_again(tiny_model(), folder, [gone])
        assert_same(expected, found)
        assert any((keep != finished[1].pruner.masks[name]).any() for name, keep in found.items())


def test_deciding_again_looks_at_the_model_and_no_more(finished):
    model = tiny_model()
    before = weights(model)
    decide_again(model, finished[0], ["two"])
    assert_same(before, weights(model))
    assert all(p.grad is None for p in model.parameters()) and list(model.heads) == ["two", "three", "real"]


def test_a_sparse_model_loses_more_and_nothing_comes_back(finished):
    folder, trainer = finished
    held = {name: keep.cpu() for name, keep in trainer.pruner.masks.items()}
    assert_same(held, decide_again(trainer.model, folder, ["two"]))
    more = decide_again(trainer.model, folder, ["two"], config=replace(SCORED, sparsity=0.9))
    assert count_pruned(more) == round(0.9 * sum(keep.numel() for keep in held.values()))
    assert all((more[name] <= keep).all() for name, keep in held.items())
    with pytest.raises(UserError, match="start from the dense model"):
        decide_again(trainer.model, folder, config=replace(SCORED, sparsity=0.5))


def test_pruning_again_takes_the_heads_away_and_zeroes_the_rest(finished):
    model = tiny_model()
    expected, heads = decide_again(model, finished[0], ["real"]), copy.deepcopy(model.heads)
    masks = prune_again(model, finished[0], ["real"])
    assert_same(expected, masks)
    assert_same(expected, find_masks(prunable_parameters(model)))
    assert list(model.heads) == ["two", "three"] == [task["name"] for task in model.config.tasks]
    assert_same(heads["two"].state_dict(), model.heads["two"].state_dict())
    assert not any(torch.signbit(p[~masks[name]]).any() for name, p in prunable_parameters(model).items())


def test_layers_that_go_again_are_skipped(tmp_path):
    trainer = saved_run(tmp_path, replace(SCORED, granularity="layer", sparsity=0.5), max_steps=2)
    model = tiny_model()
    prune_again(model, tmp_path, ["two"])
    assert len(model.config.skipped_layers) == len(trainer.model.config.skipped_layers) == 1


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["four"], "without: expected a list of some of the stored tasks, two, three, real"),
        (["two", "three", "real"], "but not all"),
        ("two", "without: expected a list"),
    ],
)
def test_only_stored_tasks_can_be_left_out_and_not_all(finished, without, message):
    with pytest.raises(UserError, match=message):
        decide_again(tiny_model(), finished[0], without)
    model = tiny_model([TaskConfig(name="two", columns="text", labels=["no", "yes"])])
    with pytest.raises(UserError, match="a task to be left"):
        prune_again(model, finished[0], ["two"])


def test_configs_that_have_no_scores_of_tasks_are_refused(finished):
    for changes in ({"decision": "joint"}, {"max_drop": 1.0}, {"keep_scores": "yes"}):
        with pytest.raises(UserError, match="keep_scores"):
            replace(SCORED, **changes)
    config = replace(SCORED, keep_scores=False, decision="joint")
    with pytest.raises(UserError, match="config: expected tasks that judge"):
        decide_again(tiny_model(), finished[0], config=config)
    with pytest.raises(UserError, match="at most the number of tasks that are left, 2, got 3"):
        decide_again(tiny_model(), finished[0], ["two"], config=replace(SCORED, decision="quorum", quorum=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "another model: only the model, not the file, has '"),
        (lambda t: t.update(other=torch.zeros(3)), "another model: only the file, not the model, has 'other'"),
        (lambda t: t.update({next(iter(t)): torch.zeros(4, 4)}), r"float32 \(16, 16\)"),
        (lambda t: t.update({next(iter(t)): torch.zeros(16, 16, dtype=torch.int32)}), "got I32"),
        (lambda t: t[next(iter(t))].fill_(float("nan")), "expected finite scores"),
        (lambda t: t[next(iter(t))].fill_(-float("inf")), "expected finite scores"),
    ],
)
def test_scores_of_another_model_are_refused(broken, change, message):
    for task in ("two", "three"):  # the first one is looked at on its own
        rewrite(broken / "scores" / f"{task}.safetensors", change)
        with pytest.raises(UserError, match=message):
            decide_again(tiny_model(), broken)
        with pytest.raises(UserError, match=message):
            decide_again(tiny_model(), broken, ["real"])


@pytest.mark.parametrize("metadata", [{"version": "2"}, {"place": "x"}, {"place": "-1"}, {"place": "9" * 5000}])
def test_files_of_another_format_are_refused(broken, metadata):
    rewrite(broken / "scores" / "two.safetensors", lambda t: None, **metadata)
    with pytest.raises(UserError, match="format version 1"):
        decide_again(tiny_model(), broken)


def test_a_file_that_is_not_whole_is_refused(broken):
    path = broken / "scores" / "three.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="does not parse"):
            decide_again(tiny_model(), broken)


# New tasks


@pytest.mark.parametrize("training", [True, False])
def test_a_new_head_starts_fresh_and_nothing_else_moves(tmp_path, training):
    model = tiny_model().train(training)
    before = weights(model)
    model.add_task(NEW)
    after = weights(model)
    assert_same(before, {name: tensor for name, tensor in after.items() if ".new." not in name})
    head = model.heads["new"]
    assert head.training == training and head.classifier.weight.shape == (2, 16)
    assert 0.01 < head.classifier.weight.std() < 0.03 and (head.classifier.bias == 0).all()
    assert list(model.tasks.values()) == [*three_tasks(), NEW]
    model.save_pretrained(tmp_path)
    assert_same(after, weights(MultitaskModel.from_pretrained(tmp_path)))
    half = tiny_model().to(torch.bfloat16)
    half.add_task(NEW)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["two", "keys"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(UserError, match="is taken or reserved; the model has two, three, real"):
        tiny_model().add_task(TaskConfig(name=name, columns="text", labels=["a", "b"]))


def test_rank_correlation_is_spearman_s():
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.rand(500, generator=generator), torch.rand(500, generator=generator)
    for share in (0.0, 0.3, 1.0):
        second = share * first + (1 - share) * noise
        expected = spearmanr(first.numpy(), second.numpy()).statistic
        assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(first, -first) == pytest.approx(-1)


@pytest.mark.parametrize("voters", [1, 2, 3, 4])
def test_the_majority_is_more_than_half(voters):
    rng = np.random.default_rng(0)
    votes = rng.random((voters, 5, 7)) > 0.4
    found = majority(({"w": torch.from_numpy(vote)} for vote in votes), voters)["w"]
    assert np.array_equal(found.numpy(), votes.mean(axis=0) > 0.5)


def test_the_nearest_tasks_vote_on_the_layers_of_the_new_one(finished):
    folder, trainer = finished
    model = copy.deepcopy(trainer.model)
    model.add_task(NEW)
    model.heads["new"].load_state_dict(model.heads["two"].state_dict())  # a head that knows what "two" knows
    unshare(model, 1, ["new"])
    masks, similarity = vote_masks(model, "new", batches("two"), folder, nearest=2)
    assert set(similarity) == {"two", "three", "real"}
    assert list(similarity.values()) == sorted(similarity.values(), reverse=True)
    parameters = prunable_parameters(model)
    assert set(masks) == set(parameters)
    # By hand: each voter keeps its own best 30 %, both must agree, and what is zero stays so.
    voters, size = list(similarity)[:2], sum(keep.numel() for keep in trainer.pruner.masks.values())
    kept = []
    for task in voters:
        scores = load_file(folder / "scores" / f"{task}.safetensors")
        names = list(trainer.pruner.masks)
        flat = np.concatenate([scores[name].numpy().ravel() for name in names])
        keep = np.zeros(size, dtype=bool)
        keep[np.argsort(-flat, kind="stable")[: size - round(0.7 * size)]] = True
        ends = np.cumsum([scores[name].numel() for name in names])[:-1]
        kept.append(dict(zip(names, np.split(keep, ends), strict=True)))
    for name, mask in masks.items():
        alive = (parameters[name] != 0).detach().numpy()
        source = name.replace("encoder.private.new.0.", "encoder.encoder.layer.1.")
        both = (kept[0][source] & kept[1][source]).reshape(alive.shape)
        assert np.array_equal(mask.numpy(), alive & both if "private" in name else alive), name
    assert count_pruned(masks) > count_pruned(find_masks(parameters))


def test_a_task_that_is_a_known_one_again_is_nearest_to_it(finished):
    folder, trainer = finished
    for known in ("two", "three", "real"):
        model = MultitaskModel(trainer.model.config.__class__.from_dict(trainer.model.config.to_dict()))
        model.load_state_dict(tiny_model().state_dict())
        for task in [task for task in model.heads if task != known]:
            model.remove_task(task)
        masks, similarity = vote_masks(model, known, batches(known, 5), folder, nearest=1)
        assert next(iter(similarity)) == known
        assert count_pruned(masks) == round(0.7 * sum(keep.numel() for keep in masks.values()))  # dense: its own mask


def test_a_new_task_learns_and_the_others_keep_their_bits(finished, tmp_path):
    folder, trainer = finished
    model = copy.deepcopy(trainer.model)
    before = weights(model)
    model.add_task(NEW)
    unshare(model, 1, ["new"])
    masks, _ = vote_masks(model, "new", batches("two"), folder)
    model.encoder.requires_grad_(False)
    model.encoder.private.requires_grad_(True)
    rows = {"new": three_datasets()["two"]}
    DisparseTrainer(
        model, arguments(tmp_path), masks=masks, train_dataset=rows, processing_class=tiny_tokenizer()
    ).train()
    after = weights(model)
    assert_same(before, {name: after[name] for name in before})
    for name, parameter in prunable_parameters(model).items():
        assert (parameter[~masks[name]] == 0).all()


@pytest.mark.parametrize(
    ("task", "changes", "nearest", "message"),
    [
        ("two", {}, 1, "task: expected one with layers of its own, got 'two'"),
        ("four", {}, 1, "task: expected one with layers of its own, got 'four'"),
        ("real", {}, 4, "nearest: expected 1 to 3"),
        ("real", {}, 0, "nearest: expected 1 to 3"),
        ("real", {"criterion": "magnitude"}, 1, "scores by gradients"),
        ("real", {"granularity": "head"}, 1, "expected weight"),
    ],
)
def test_votes_that_mean_nothing_are_refused(finished, task, changes, nearest, message):
    model = tiny_model()
    unshare(model, 1, ["real"])
    with pytest.raises(UserError, match=message):
        vote_masks(model, task, batches("real"), finished[0], nearest, config=replace(SCORED, **changes))

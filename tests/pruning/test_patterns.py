"""N:M and blocks: the decision by brute force, the exact pattern after training, refused settings."""

import itertools

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_disparse import MultitaskModel, PruningConfig, UserError, find_masks, prunable_parameters
from hf_disparse.export.card import write_card
from hf_disparse.pruning.decision import decide
from hf_disparse.pruning.patterns import (
    decide_n_of_m,
    expand_blocks,
    misfits,
    pool_blocks,
    pruned_in_groups,
    ranks_in_groups,
)
from hf_disparse.recipes.recipe import read_recipe
from tests.helpers.resuming import killed_and_resumed, slow
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.training import Watch, assert_same, multitask_trainer, weights

DECISIONS = ["unanimous", "quorum", "joint", "sum", "max", "mean_rank"]


def by_hand(scores: np.ndarray, n: int, m: int, decision: str, quorum: int, active: np.ndarray) -> np.ndarray:
    """The definition, group by group with Python's sort. Shapes: scores (tasks, rows, columns), active (rows, columns)."""
    keep = np.zeros(active.shape, dtype=bool)
    shares = scores / scores.sum(axis=(1, 2), keepdims=True)
    for row in range(active.shape[0]):
        for start in range(0, active.shape[1], m):
            places = range(start, start + m)
            ranks = {place: [] for place in places}
            for task in range(len(scores)):
                order = sorted(places, key=lambda p: (not active[row, p], -scores[task, row, p], p))
                for rank, place in enumerate(order):
                    ranks[place].append(rank if scores[task, row, place] else m)
            cost = {
                "unanimous": lambda p: (min(ranks[p]), sum(ranks[p])),  # noqa: B023
                "quorum": lambda p: (sorted(ranks[p])[quorum - 1], sum(ranks[p])),  # noqa: B023
                "joint": lambda p: ranks[p],  # noqa: B023
                "mean_rank": lambda p: sum(ranks[p]),  # noqa: B023
                "sum": lambda p: -shares[:, row, p].sum(),  # noqa: B023
                "max": lambda p: -shares[:, row, p].max(),  # noqa: B023
            }[decision]
            for place in sorted(places, key=lambda p: (not active[row, p], cost(p), p))[:n]:
                keep[row, place] = True
    return keep


@pytest.mark.parametrize("decision", DECISIONS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5), (1, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_n_of_m_equals_the_definition(decision, n, m, seed):
    draw = np.random.default_rng(seed)
    tasks = 1 if decision == "joint" else 4
    quorum = 2 if decision == "quorum" else 1
    scores = draw.random((tasks, 6, 4 * m))
    if decision not in ("sum", "max"):
        scores = np.floor(4 * scores)  # few values, so that they tie
    active = np.ones((6, 4 * m), dtype=bool)
    active[draw.integers(0, 6), 0] = False
    given = {f"t{i}": {"w": torch.from_numpy(s)} for i, s in enumerate(scores)}
    if m - n == 1 and not seed:
        active[:] = True
    mask = decide_n_of_m(given, n, m, decision, quorum, {"w": torch.from_numpy(active)})["w"].numpy()
    assert (mask == by_hand(scores, n, m, decision, quorum, active)).all()
    assert (mask.reshape(-1, m).sum(axis=1) == n).all()


def test_magnitude_by_2_of_4_is_torch_s_own_sparsifier():
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(16, 8))
    ours = decide_n_of_m({"t": {"w": layer[0].weight.detach().abs()}}, 2, 4)["w"]
    sparsifier = WeightNormSparsifier(1.0, (1, 4), 2)
    sparsifier.prepare(layer, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(layer[0].weight != 0, ours)


def test_every_task_keeps_the_weight_it_wants_most():
    scores = {"a": torch.tensor([[9.0, 1, 2, 3]]), "b": torch.tensor([[0.1, 0.9, 0.2, 0.3]])}
    mask = decide_n_of_m({task: {"w": s} for task, s in scores.items()}, 2, 4)["w"]
    assert mask.tolist() == [[True, True, False, False]]
    third = {
        "c": {"w": torch.tensor([[0.1, 0.9, 0.2, 0.3]])}
    }  # each of three weights is some task's first: two tasks beat one
    mask = decide_n_of_m({task: {"w": s} for task, s in scores.items()} | third, 1, 4)["w"]
    assert mask.tolist() == [[False, True, False, False]]


def test_what_decide_n_of_m_does_not_take():
    one = {"w": torch.ones(2, 6)}
    with pytest.raises(ValueError, match=r"expected a multiple of 4 columns, got \(2, 6\) for 'w'"):
        decide_n_of_m({"t": one}, 2, 4)
    with pytest.raises(ValueError, match="expected at least 2 of every 3 weights, got fewer in a group of 'w'"):
        decide_n_of_m({"t": one}, 2, 3, active={"w": torch.tensor([[True] * 6, [True, False, False] + [True] * 3])})
    with pytest.raises(ValueError, match=r"quorum: expected a whole number in 1\.\.1"):
        decide_n_of_m({"t": one}, 2, 3, "quorum", 2)
    with pytest.raises(ValueError, match="NaN or infinity in 'w' of task 't'"):
        decide_n_of_m({"t": {"w": torch.full((2, 6), torch.nan)}}, 2, 3)
    with pytest.raises(ValueError, match="expected at least one task"):
        decide_n_of_m({}, 2, 4)


def test_ranks_are_within_groups_and_pruned_weights_last():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 0.0, 0.0, 5.0, -0.0]])
    assert ranks_in_groups(scores, 4).tolist() == [[3, 0, 1, 2, 1, 2, 0, 3]]
    live = torch.tensor([[True, False, True, True, True, True, False, True]])
    assert ranks_in_groups(scores, 4, live).tolist() == [[2, 3, 0, 1, 0, 1, 3, 2]]


def test_what_counts_as_pruned_in_groups_is_what_has_to_go():
    masks = {"w": torch.tensor([[True, False, False, False, True, True, False, True]])}
    assert pruned_in_groups(masks, 2, 4) == (2 + 1, 8)  # the third zero of the first group does not count


def test_blocks_pool_and_expand_as_by_hand():
    draw = np.random.default_rng(0)
    matrix = draw.integers(0, 9, (6, 8)).astype(float)
    pooled = pool_blocks({"w": torch.from_numpy(matrix)}, 3, 2)["w"]
    for i, j in itertools.product(range(2), range(4)):
        assert pooled[i, j] == matrix[3 * i : 3 * i + 3, 2 * j : 2 * j + 2].sum()
    back = expand_blocks({"w": pooled}, 3, 2)["w"].numpy()
    for i, j in itertools.product(range(6), range(8)):
        assert back[i, j] == pooled[i // 3, j // 2]
    assert list(misfits({"w": torch.ones(6, 8), "v": torch.ones(6, 9), "b": torch.ones(6)}, 3, 2)) == ["v", "b"]


def blocks_gone(model, rows: int, columns: int) -> tuple[int, int]:
    """How many blocks are all zero, of how many, by numpy; a block is whole or gone."""
    gone, size = 0, 0
    for p in prunable_parameters(model).values():
        matrix = p.detach().numpy()
        for i, j in itertools.product(range(0, len(matrix), rows), range(0, matrix.shape[1], columns)):
            zeros = (matrix[i : i + rows, j : j + columns] == 0).sum()
            assert zeros in (0, rows * columns)
            gone, size = gone + (zeros > 0), size + 1
    return gone, size


@pytest.mark.parametrize("decision", DECISIONS)
def test_training_gives_2_of_4_in_every_group_and_in_the_saved_model(tmp_path, decision):
    quorum = 2 if decision == "quorum" else 1
    config = PruningConfig(
        sparsity=0.5, granularity="2:4", decision=decision, quorum=quorum, score_batches=2, start_step=2
    )
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch], max_steps=5)
    trainer.train()
    assert watch.zeros == [0, 0, 2048, 2048, 2048] and all(watch.agree)
    trainer.save_model(tmp_path / "saved")
    masks = find_masks(prunable_parameters(MultitaskModel.from_pretrained(tmp_path / "saved")))
    assert_same(masks, trainer.pruner.masks)
    assert all((mask.reshape(-1, 4).sum(dim=1) == 2).all() for mask in masks.values())
    assert pruned_in_groups(masks, 2, 4) == (2048, 4096)


def test_blocks_go_step_by_step_in_exact_numbers_and_none_comes_back(tmp_path):
    steps = dict(schedule="cubic", end_step=6, update_every=2, score_batches=2)
    config = PruningConfig(sparsity=0.7, granularity="block8x4", decision="sum", **steps)
    gone, seen = [], []

    class Count(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            gone.append(blocks_gone(model, 8, 4)[0])
            seen.append(find_masks(prunable_parameters(model)))

    trainer = multitask_trainer(tmp_path, config, callbacks=[Count()])
    trainer.train()
    expected = [round(0.7 * (1 - (1 - step / 6) ** 3) * 128) for step in (2, 4, 6)]
    assert gone == [0, 0, *(count for count in expected for _ in range(2))]
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after)
    trainer.save_model(tmp_path / "saved")
    assert blocks_gone(MultitaskModel.from_pretrained(tmp_path / "saved"), 8, 4) == (90, 128)


def test_blocks_are_decided_by_the_sum_of_their_scores(tmp_path):
    """One shot by magnitude: the blocks with the smallest sums of |w|, found with numpy."""
    model = tiny_model()
    sums = {
        name: np.abs(p.detach().double().numpy()).reshape(len(p) // 16, 16, -1, 16).sum(axis=(1, 3))
        for name, p in prunable_parameters(model).items()
    }
    flat = np.concatenate([s.reshape(-1) for s in sums.values()])
    limit = np.sort(flat)[round(0.25 * len(flat)) - 1]
    config = PruningConfig(sparsity=0.25, granularity="block16x16", criterion="magnitude")
    trainer = multitask_trainer(tmp_path, config, model, max_steps=1)
    trainer.train()
    for name, mask in trainer.pruner.masks.items():
        kept = mask.reshape(len(mask) // 16, 16, -1, 16).numpy()
        assert (kept.all(axis=(1, 3)) == (sums[name] > limit)).all()
        assert (kept.any(axis=(1, 3)) == (sums[name] > limit)).all()


@pytest.mark.parametrize(
    "pruning",
    [
        *slow(dict(sparsity=0.75, granularity="1:4", start_step=4)),
        dict(sparsity=0.6, granularity="block8x8", schedule="cubic", start_step=1, end_step=10, update_every=3),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, pruning):
    config = PruningConfig(score_batches=2, **pruning)
    steps = dict(max_steps=12, save_strategy="steps", save_steps=3, learning_rate=3e-3)
    whole = multitask_trainer(tmp_path / "whole", config, **steps)
    whole.train()
    for die in (5, 9):
        again = killed_and_resumed(tmp_path / str(die), config, die, **steps)
        assert_same(weights(whole.model), weights(again.model))
        assert_same(whole.pruner.masks, again.pruner.masks)


@pytest.mark.parametrize(("granularity", "sparsity"), [("2:4", 0.5), ("block8x8", 0.5)])
def test_a_model_in_the_pattern_is_left_alone_and_one_of_other_zeros_is_not(tmp_path, granularity, sparsity):
    config = PruningConfig(sparsity=sparsity, granularity=granularity, score_batches=2)
    first = multitask_trainer(tmp_path, config, max_steps=2)
    first.train()
    masks = first.pruner.masks
    second = multitask_trainer(tmp_path, config, first.model, masks=masks, max_steps=2)
    second.train()
    assert_same(masks, second.pruner.masks)
    assert second.backward_passes == 2, "there was nothing to score"
    model = tiny_model()
    scores = {name: p.detach().abs() for name, p in prunable_parameters(model).items()}
    other = decide({"t": scores}, 0.5)
    third = multitask_trainer(tmp_path, config, model, masks=other, max_steps=2)
    if granularity == "2:4":
        with pytest.raises(UserError, match=r"expected 2 weights left of every 4 for 2:4, got fewer in 'encoder\."):
            third.train()
    else:
        third.train()
        kept = pool_blocks(third.pruner.masks, 8, 8)
        assert sum(int((k == 0).sum()) for k in kept.values()) == 32


@pytest.mark.parametrize("granularity", ["2:5", "block16x12"])
def test_a_matrix_that_does_not_divide_is_named_before_the_first_step(tmp_path, granularity):
    config = PruningConfig(sparsity=0.6, granularity=granularity, start_step=3)
    with pytest.raises(
        UserError, match=r"got 16 x 16 for 'encoder\.encoder\.layer\.0\.attention\.self\.query\.weight'"
    ):
        multitask_trainer(tmp_path, config).train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": "2:4"}, r"sparsity: expected 0\.5 with granularity 2:4, got 0\.8"),
        (
            {"granularity": "1:3", "sparsity": 0.667},
            r"sparsity: expected 0\.6666666667 with granularity 1:3, got 0\.667",
        ),
        ({"granularity": "4:4", "sparsity": 0.0}, "granularity: expected N below M in a pattern N:M, got '4:4'"),
        ({"granularity": "0:4", "sparsity": 0.5}, "granularity: unknown value '0:4'; did you mean '2:4'"),
        ({"granularity": "block16"}, "granularity: unknown value 'block16'; did you mean 'block16x16'"),
        (
            {"granularity": ["2:4", "head"], "sparsity": 0.5},
            "granularity: expected a single one, or several of head, neuron and layer",
        ),
        ({"granularity": ["block2x2", "2:4"], "sparsity": 0.5}, "granularity: expected a single one, or several of"),
        (
            {"granularity": "2:4", "sparsity": 0.5, "schedule": "cubic", "end_step": 5},
            "schedule: expected one_shot with granularity 2:4, which has no steps, got 'cubic'",
        ),
    ],
)
def test_patterns_that_make_no_sense_are_refused_at_birth(values, message):
    with pytest.raises(UserError, match=message):
        PruningConfig(**values)


def test_a_pattern_of_another_method_is_refused():
    class Other(PruningConfig):
        method = "no_patterns"

    with pytest.raises(UserError, match=r"expected one of weight, .* with method no_patterns, got the pattern '2:4'"):
        Other(granularity="2:4", sparsity=0.5)


def test_the_sparsity_of_1_of_3_may_be_written_with_ten_digits(tmp_path):
    for sparsity in (2 / 3, 0.6666666667):
        config = PruningConfig(granularity="1:3", sparsity=sparsity)
        config.save_pretrained(tmp_path)
        assert PruningConfig.from_pretrained(tmp_path) == config
        assert config.n_of_m == (1, 3) and config.block is None and not config.prunes_parts


@pytest.mark.parametrize("written", ["2:4", '"2:4"'])
def test_a_recipe_may_write_the_pattern_without_quotes(tmp_path, written):
    """In YAML 1.1 it would be the number 124."""
    text = "model: {encoder: x}\ntasks: {t: {data: x.csv, columns: a, labels: [p, q]}}\noutput_dir: y\n"
    (tmp_path / "r.yaml").write_text(
        f"{text}pruning: {{granularity: {written}, sparsity: 0.5}}\ntraining: {{use_cpu: true}}\n"
    )
    assert read_recipe(tmp_path / "r.yaml").pruning.granularity == ("2:4",)
    recipe = read_recipe(tmp_path / "r.yaml", ["pruning.granularity=1:4", "pruning.sparsity=0.75"])
    assert recipe.pruning.n_of_m == (1, 4)


@pytest.mark.parametrize(
    ("granularity", "said"),
    [
        ("2:4", "50 % of the weights (2 of every 4 along each row: the pattern 2:4)"),
        ("block8x8", "50 % of the 8 x 8 blocks"),
    ],
)
def test_the_card_says_the_pattern(tmp_path, granularity, said):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    PruningConfig(sparsity=0.5, granularity=granularity).save_pretrained(tmp_path)
    assert said in str(write_card(tmp_path))

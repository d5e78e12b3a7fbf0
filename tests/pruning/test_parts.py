"""Heads, neurons and layers as parts: where they are, how tasks decide over them, how training prunes them."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    GPT2Config,
    MobileBertConfig,
    Trainer,
    TrainingArguments,
)

from hf_disparse import (
    DisparseTrainer,
    DisparseTrainingArguments,
    MultitaskConfig,
    MultitaskModel,
    PruningCallback,
    PruningConfig,
    UserError,
)
from hf_disparse.export import compact, save_compact, save_packed, save_tasks
from hf_disparse.model.architectures import find_sites
from hf_disparse.model.prunable import prunable_parameters, prunable_sites
from hf_disparse.pruning.parts import Site, mask_of_parts, sum_by_part
from hf_disparse.pruning.rules import decide_parts, keep_parts
from tests.helpers.compacting import prune_parts
from tests.helpers.tiny import CONFIGS, three_datasets, three_tasks, tiny_bert_config, tiny_model, tiny_tokenizer

HEADS = Site(2, {"q": (0, torch.tensor([0, 0, 1, 1])), "o": (1, torch.tensor([0, 0, 1, 1]))})


def test_a_part_is_the_sum_of_its_rows_and_columns():
    scores = {"q.weight": torch.arange(12.0).reshape(4, 3), "o.weight": torch.ones(3, 4)}
    # rows 0 and 1 hold 0..5, rows 2 and 3 hold 6..11; two columns of three ones each
    assert sum_by_part(scores, HEADS).tolist() == [15 + 6, 51 + 6]


def test_a_part_goes_with_all_its_rows_and_columns_and_nothing_else():
    masks = {"q.weight": torch.ones(4, 3, dtype=torch.bool), "o.weight": torch.ones(3, 4, dtype=torch.bool)}
    masks["q.weight"][3, 0] = False  # gone before
    pruned = mask_of_parts(masks, HEADS, torch.tensor([False, True]))
    assert pruned["q.weight"].tolist() == [[False] * 3, [False] * 3, [True] * 3, [False, True, True]]
    assert pruned["o.weight"].tolist() == [[False, False, True, True]] * 3


@pytest.mark.parametrize("model_type", CONFIGS)
def test_parts_cover_every_prunable_weight_once(model_type):
    """Of each kind of part, on every architecture: all weights of attention and FFN, no weight twice."""
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[model_type]())
    prunable, sites = prunable_parameters(model), find_sites(model)
    named = {kind: [f"{m}.weight" for site in places.values() for m in site.members] for kind, places in sites.items()}
    assert sorted(named["head"] + named["neuron"]) == sorted(prunable)
    stays = {name for name in prunable if model_type == "modernbert" and name.startswith("layers.0.")}
    assert sorted(named["layer"]) == sorted(set(prunable) - stays)
    ones = {name: torch.ones_like(p) for name, p in prunable.items()}
    for kind, places in sites.items():
        total = sum(sum_by_part(ones, site).sum().item() for site in places.values())
        assert total == sum(prunable[name].numel() for name in named[kind])
    assert [site.parts for site in sites["head"].values()] == [2, 2]
    assert [site.parts for site in sites["neuron"].values()] == [32, 32]


def by_hand(scores: np.ndarray, sizes: list[int], count: int, quorum: int) -> np.ndarray:
    """Rank every task's parts, those it has no use for last, take the quorum-th best rank, protect the best of each site, drop the worst `count`."""

    def cost(part_scores):
        order = np.argsort(-part_scores, axis=1, kind="stable")
        ranks = np.empty_like(order)
        for task in range(len(order)):
            ranks[task, order[task]] = np.arange(order.shape[1])
        ranks[part_scores == 0] = order.shape[1]
        return np.sort(ranks, axis=0)[quorum - 1]

    starts = np.cumsum([0, *sizes])
    best = [a + int(np.argmin(cost(scores[:, a:b]))) for a, b in itertools.pairwise(starts)]
    rest = np.setdiff1d(np.arange(starts[-1]), best)
    worst = np.argsort(cost(scores[:, rest]), kind="stable")[len(rest) - count :]
    keep = np.ones(starts[-1], dtype=bool)
    keep[rest[worst]] = False
    return keep


@pytest.mark.parametrize("quorum", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_parts_are_decided_as_by_hand(seed, quorum):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 6, 4).tolist()
    scores = draw.permutation(3 * sum(sizes)).reshape(3, -1).astype(float)
    count = int(draw.integers(0, sum(sizes) - 3))
    config = PruningConfig(granularity="head", decision="quorum" if quorum > 1 else "unanimous", quorum=quorum)
    split = [dict(zip("abcd", torch.from_numpy(s).split(sizes), strict=True)) for s in scores]
    live = {name: torch.ones(size, dtype=torch.bool) for name, size in zip("abcd", sizes, strict=True)}
    keep = keep_parts(config, "head", list(zip("xyz", split, strict=True)), count / sum(sizes), live)
    assert torch.cat(list(keep.values())).tolist() == by_hand(scores, sizes, count, quorum).tolist()


@pytest.mark.parametrize("decision", ["unanimous", "joint", "sum", "max", "mean_rank"])
def test_one_task_is_cut_by_its_scores_and_every_layer_keeps_its_best_head(decision):
    model, config = tiny_model(), PruningConfig(granularity="head", decision=decision, sparsity=0.5)
    sites = prunable_sites(model, config)
    parameters = prunable_parameters(model)
    scores = {name: torch.full_like(p, 10.0 if "layer.0" in name else 1.0) for name, p in parameters.items()}
    scores["encoder.encoder.layer.1.attention.self.value.weight"][8:] = 2.0  # the second head of the second layer
    scores["encoder.encoder.layer.0.attention.self.value.weight"][:8] = 20.0  # the first of the first
    active = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    masks = decide_parts(config, [("task", scores)], 0.5, active, sites)
    kept = [(sum_by_part(masks, site) > 0).tolist() for site in sites["head"].values()]
    assert kept == [[True, False], [False, True]]  # by scores alone both would be of the first layer


def test_more_than_all_but_one_of_each_layer_is_refused():
    config = PruningConfig(granularity="head")
    live = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    scores = [("task", {"a": torch.rand(2), "b": torch.rand(2)})]
    with pytest.raises(UserError, match=r"at most 0\.500, as one head of each of 2 sites stays, got 0\.75"):
        keep_parts(config, "head", scores, 0.75, live)


def train(folder, granularity, steps: int = 6, model=None, **pruning):
    trainer = DisparseTrainer(
        model or tiny_model(),
        DisparseTrainingArguments(
            folder,
            max_steps=steps,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            save_steps=3,
            report_to="none",
            use_cpu=True,
        ),
        pruning_config=PruningConfig(**{"granularity": granularity, "sparsity": 0.5, "score_batches": 2, **pruning}),
        train_dataset=three_datasets(),
        eval_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def parts_left(model) -> dict[str, int]:
    prunable = {name: p.detach() != 0 for name, p in prunable_parameters(model).items()}
    sites = find_sites(model.encoder, "encoder.")
    return {
        kind: sum(int((sum_by_part(prunable, site) > 0).sum()) for site in places.values())
        for kind, places in sites.items()
    }


@pytest.mark.parametrize("granularity", ["head", "neuron", ["head", "neuron"], "layer"])
def test_training_prunes_exactly_that_many_parts_and_they_stay_pruned(granularity, tmp_path):
    model = train(tmp_path, granularity, schedule="cubic", start_step=1, end_step=4, update_every=1).model
    kinds = [granularity] if isinstance(granularity, str) else granularity
    whole = {"head": 4, "neuron": 64, "layer": 2}
    left = parts_left(model)
    assert all(left[kind] == whole[kind] // 2 for kind in kinds), left
    assert bool(model.config.skipped_layers) == (granularity == "layer")
    assert compact(model)[kinds[0]] == (whole[kinds[0]], whole[kinds[0]] // 2)


def test_a_run_that_skips_layers_resumes_to_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", "layer")
    again = train(tmp_path / "again", "layer", steps=3)
    again.args.max_steps = 6
    resumed = DisparseTrainer(
        tiny_model(),
        again.args,
        pruning_config=again.pruning_config,
        train_dataset=three_datasets(),
        eval_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.config.skipped_layers == whole.model.config.skipped_layers != []
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_trainer_goes_on_after_a_compaction(tmp_path):
    """Nothing of the optimizer's state is lost: the next steps are those of a model that was only masked."""

    class CompactAt(PruningCallback):
        def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
            if state.global_step == 3 and self.shrink:
                self.release()
                self.masks = None
                compact(model, optimizer.optimizer)

    runs = []
    for shrink in (False, True):
        torch.manual_seed(0)
        config = tiny_bert_config()
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # which draws by the shapes there are
        model = BertForSequenceClassification(config)
        rows = three_datasets()["two"]
        pruner = CompactAt(PruningConfig(granularity=["head", "neuron"], sparsity=0.5), {"two": [batch_of(rows)]})
        pruner.shrink = shrink
        trainer = Trainer(
            model,
            TrainingArguments(
                tmp_path, max_steps=6, learning_rate=1e-3, per_device_train_batch_size=4, report_to="none", use_cpu=True
            ),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            callbacks=[pruner],
        )
        trainer.train()
        runs.append(model.eval())
    masked, small = runs
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    batch = {k: v for k, v in batch_of(rows).items() if k != "labels"}
    torch.testing.assert_close(small(**batch).logits, masked(**batch).logits, atol=1e-5, rtol=1e-4)


def batch_of(rows) -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer().pad([dict(row) for row in rows.select(range(8))], return_tensors="pt"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"granularity": "heads"}, "granularity: unknown value 'heads'; did you mean 'head'"),
        ({"granularity": ["weight", "head"]}, "granularity: expected a single one, or several of"),
        ({"granularity": []}, "granularity: expected a name or a list of names"),
        (
            {"granularity": "head", "target_modules": ["query"]},
            "target_modules: not used where a head is pruned as a whole; remove it",
        ),
    ],
)
def test_a_granularity_that_makes_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        PruningConfig(**values)


def test_layers_of_a_plain_model_are_refused(tmp_path):
    model = BertForSequenceClassification(tiny_bert_config())
    rows = three_datasets()["two"]
    pruner = PruningCallback(PruningConfig(granularity="layer"), {"two": [batch_of(rows)]})
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True)
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[pruner])
    with pytest.raises(UserError, match="layers are pruned from a MultitaskModel only"):
        trainer.train()


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16),
        MobileBertConfig(num_hidden_layers=1, hidden_size=32, embedding_size=8, intra_bottleneck_size=8, vocab_size=16),
    ],
)
def test_an_unknown_architecture_is_named(config):
    """MobileBERT's layers have the names of BERT's, and several feed-forward blocks."""
    model = AutoModel.from_config(config)
    with pytest.raises(UserError, match=rf"expected an encoder with the layers of BERT, .* got {type(model).__name__}"):
        find_sites(model)


@pytest.mark.parametrize("places", [[2], [-1], [True], ["0"]])
def test_places_of_layers_that_are_not_there(places):
    with pytest.raises(UserError, match="skipped_layers: expected indices of 2 layers"):
        tiny_model().skip_layers(places)


def test_a_skipped_layer_hands_on_its_input(tmp_path):
    model = tiny_model().eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    hidden = model.encoder(ids, output_hidden_states=True).hidden_states
    model.skip_layers([1])
    assert torch.equal(model.encoder(ids)[0], hidden[1])
    model.skip_layers([])
    assert torch.equal(model.encoder(ids)[0], hidden[2])
    model.skip_layers([0])
    model.save_pretrained(tmp_path)
    assert MultitaskModel.from_pretrained(tmp_path).config.skipped_layers == [0]


@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
@pytest.mark.parametrize("other", ["head", "neuron"])
def test_layers_and_their_parts_together_are_exact(other, schedule, tmp_path):
    """The heads of a layer that goes are gone and count. In steps, a layer may go after heads of those that stay."""
    config = tiny_bert_config()
    config.num_hidden_layers, config.num_attention_heads = 6, 4
    torch.manual_seed(0)
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks()))
    steps = dict(schedule="cubic", start_step=1, end_step=4, update_every=1) if schedule == "cubic" else {}
    trained = train(tmp_path, [other, "layer"], model=model, **steps).model
    whole = {"head": 24, "neuron": 192}
    left = parts_left(trained)
    least = whole[other] // 2 if schedule == "one_shot" else whole[other] // 2 - whole[other] // 12
    assert left["layer"] == 3 and least <= left[other] <= whole[other] // 2, left
    assert len(trained.config.skipped_layers) == 3


def test_too_high_a_sparsity_of_parts_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"at most 0\.500, as one head of each of 2 sites stays"):
        train(tmp_path, "head", schedule="one_shot", start_step=5, sparsity=0.9)


def test_layers_that_were_skipped_before_stay_skipped(tmp_path):
    config = tiny_bert_config()
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    model = MultitaskModel(MultitaskConfig(encoder_config=config, tasks=three_tasks(), skipped_layers=[2]))
    trained = train(tmp_path, "layer", model=model).model
    assert 2 in trained.config.skipped_layers


def test_hidden_states_that_were_asked_for_before_know_of_a_skip():
    model = tiny_model().eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    model.encoder(ids, output_hidden_states=True)
    model.skip_layers([1])
    hidden = model.encoder(ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[2], hidden[1])


@pytest.mark.parametrize("kind", ["skipped", "compact", "packed"])
def test_a_new_task_starts_from_what_was_pruned(kind, tmp_path):
    model = tiny_model().eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    if kind == "skipped":
        model.skip_layers([1])
    else:
        prune_parts(model)
    if kind == "compact":
        compact(model)
    (save_packed if kind == "packed" else MultitaskModel.save_pretrained)(model, tmp_path / "source")
    new = MultitaskModel.from_encoder(str(tmp_path / "source"), three_tasks()[:1]).eval()
    torch.testing.assert_close(new.encoder(ids)[0], model.encoder(ids)[0])
    new.save_pretrained(tmp_path / "new")
    again = MultitaskModel.from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(again.encoder(ids)[0], model.encoder(ids)[0])


@pytest.mark.parametrize("form", ["compact", "packed"])
def test_a_plain_encoder_of_any_form_starts_a_multitask_model(form, tmp_path):
    torch.manual_seed(0)
    plain = AutoModel.from_config(tiny_bert_config()).eval()
    prune_parts(plain)
    ids = torch.tensor([[2, 5, 6, 3]])
    expected = plain(ids)[0].detach()
    (save_packed if form == "packed" else save_compact)(plain, tmp_path / "source")
    model = MultitaskModel.from_encoder(str(tmp_path / "source"), three_tasks()).eval()
    torch.testing.assert_close(model.encoder(ids)[0], expected, atol=2e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "model")
    again = MultitaskModel.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again.encoder(ids)[0], expected, atol=2e-6, rtol=1e-5)
    if form == "packed":
        save_tasks(again, tmp_path / "task", "two")
        BertForSequenceClassification.from_pretrained(tmp_path / "task")

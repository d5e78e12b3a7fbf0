"""DisparseTrainer: routing, exact zeros, evaluation, and the plain Trainer where nothing is asked of it."""

import itertools
import math

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_disparse import (
    DisparseTrainer,
    MultitaskModel,
    PruningCallback,
    PruningConfig,
    TaskConfig,
    UserError,
    find_masks,
    prunable_parameters,
)
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, Watch, arguments, assert_same, multitask_trainer, plain_model, weights


def test_sparsity_zero_is_the_plain_trainer_bit_for_bit(tmp_path):
    results = []
    for cls, extra in ((Trainer, {}), (DisparseTrainer, {"pruning_config": PruningConfig(sparsity=0.0)})):
        trainer = cls(
            model=plain_model(),
            args=arguments(tmp_path, lr_scheduler_type="cosine", gradient_accumulation_steps=2),
            train_dataset=tokenized_rows(BINARY, 40),
            processing_class=tiny_tokenizer(),
            **extra,
        )
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


@pytest.mark.parametrize("decision", ["unanimous", "quorum", "joint", "sum", "max", "mean_rank"])
def test_every_decision_prunes_the_exact_count_and_holds_it(tmp_path, decision):
    quorum = 2 if decision == "quorum" else 1
    config = PruningConfig(sparsity=0.7, decision=decision, quorum=quorum, score_batches=2, start_step=3)
    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch])
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    assert watch.zeros == [0] * 3 + [round(0.7 * total)] * 5
    assert all(watch.agree)


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "disparse", "fisher", "random"])
def test_cubic_schedule_prunes_in_steps_and_never_revives(tmp_path, criterion):
    config = PruningConfig(
        sparsity=0.8, criterion=criterion, schedule="cubic", end_step=6, update_every=2, score_batches=2
    )
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            seen.append(find_masks(prunable_parameters(model)))

    watch = Watch()
    watch.trainer = trainer = multitask_trainer(tmp_path, config, callbacks=[watch, Keep()])
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    trainer.train()
    at = [0.8 * (1 - (1 - step / 6) ** 3) for step in (2, 4, 6)]
    expected = [0, 0, *(round(s * total) for s in at for _ in range(2))]
    assert watch.zeros == expected
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after), "a pruned weight came back"


def test_pruned_gradients_do_not_count_when_gradients_are_clipped(tmp_path):
    """The logged norm is that of the gradients with zeros where weights are pruned."""
    config = PruningConfig(sparsity=0.9, score_batches=1)
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))

    logs = dict(logging_strategy="steps", logging_steps=1, max_steps=3)
    trainer = multitask_trainer(tmp_path, config, callbacks=[Norm()], max_grad_norm=1e-3, **logs)
    trainer.train()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2), "clipping saw more than what the optimizer sees"
    assert [entry["sparsity"] for entry in trainer.state.log_history[:3]] == pytest.approx([0.9] * 3, abs=1e-3)


def test_batch_1_accumulated_8_times_equals_batch_8(tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = tiny_model([BINARY])
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = DisparseTrainer(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                task_sampling="round_robin",
                optim="sgd",
                max_steps=4,
            ),
            pruning_config=PruningConfig(sparsity=0.5, criterion="magnitude"),
            train_dataset={"two": tokenized_rows(BINARY, 40)},
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        results.append(weights(trainer.model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_skipped_optimizer_step_harms_nothing(tmp_path):
    """Mixed precision skips a step whose gradients overflow; the callbacks fire all the same."""

    class Skips(torch.optim.AdamW):
        calls = 0

        def step(self, closure=None):
            type(self).calls += 1
            if self.calls not in (2, 3):
                super().step(closure)

    model, watch = tiny_model(), Watch()
    trainer = DisparseTrainer(
        model,
        arguments(tmp_path),
        pruning_config=PruningConfig(sparsity=0.7, score_batches=1, start_step=2),
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
        optimizers=(Skips(model.parameters(), lr=1e-2), None),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    total = sum(p.numel() for p in prunable_parameters(model).values())
    assert watch.zeros == [0] * 2 + [round(0.7 * total)] * 6
    assert all(watch.agree)


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    runs = []
    for seed in (1, 1, 2):
        trainer = multitask_trainer(tmp_path, PruningConfig(sparsity=0.6, score_batches=2), seed=seed)
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(runs[0], runs[1])
    assert any(not torch.equal(a, b) for a, b in zip(runs[0].values(), runs[2].values(), strict=True))


def test_losses_go_to_the_task_of_the_batch_times_its_weight(tmp_path):
    tasks = [
        TaskConfig(name="two", columns="text", labels=["no", "yes"], weight=2.5),
        TaskConfig(name="real", columns="text", problem_type="regression"),
    ]
    model = tiny_model(tasks).eval()
    trainer = DisparseTrainer(
        model,
        arguments(tmp_path),
        train_dataset={t.name: tokenized_rows(t, 8) for t in tasks},
        processing_class=tiny_tokenizer(),
    )
    for batch in trainer.get_train_dataloader():
        plain = model(**batch).loss
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        weighted = trainer.compute_loss(model, dict(batch))
        model.eval()
        torch.testing.assert_close(weighted, plain * (2.5 if batch["task"] == "two" else 1.0))
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), plain)


def test_evaluation_gives_each_task_its_metrics_and_one_average(tmp_path):
    heard = []

    class Hear(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            heard.append(metrics)

    trainer = multitask_trainer(tmp_path, callbacks=[Hear()])
    metrics = trainer.evaluate()
    values = [metrics["eval_two_accuracy"], metrics["eval_three_accuracy"], metrics["eval_real_pearson"]]
    assert metrics["eval_average"] == pytest.approx(sum(values) / 3)
    assert len(heard) == 1
    assert heard[0]["eval_average"] == metrics["eval_average"]
    rows = trainer.eval_dataset["two"]
    with torch.no_grad():
        logits = torch.cat([trainer.model(input_ids=torch.tensor([r["input_ids"]]), task="two").logits for r in rows])
    right = (logits.argmax(1) == torch.tensor(rows["labels"])).float().mean().item()
    assert metrics["eval_two_accuracy"] == pytest.approx(right)
    assert trainer.predict({"two": rows}).metrics["test_accuracy"] == pytest.approx(right)


def test_best_model_is_selected_by_the_average_once_it_is_sparse(tmp_path):
    config = PruningConfig(sparsity=0.9, schedule="cubic", end_step=6, update_every=2, score_batches=1)
    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=10)
    trainer = multitask_trainer(
        tmp_path, config, **steps, load_best_model_at_end=True, metric_for_best_model="eval_average", learning_rate=1e-3
    )
    trainer.train()
    logged = {e["step"]: e["eval_average"] for e in trainer.state.log_history if "eval_average" in e}
    sparse = {step: value for step, value in logged.items() if step > 6}
    assert trainer.state.best_metric == max(sparse.values())
    total = sum(p.numel() for p in prunable_parameters(trainer.model).values())
    zeros = sum(int((p == 0).sum()) for p in prunable_parameters(trainer.model).values())
    assert zeros == round(0.9 * total)
    best = MultitaskModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(trainer.model), weights(best))


def test_early_stopping_works_on_the_average(tmp_path):
    steps = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=30)
    trainer = multitask_trainer(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_average",
        learning_rate=0.0,
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best, two more are no better


def test_a_loss_that_is_not_finite_stops_training_before_the_weights(tmp_path):
    before = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 3:
                before.update(weights(model))
                for head in model.heads.values():
                    head.classifier.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    trainer = multitask_trainer(tmp_path, callbacks=[Poison()], save_strategy="steps", save_steps=2)
    with pytest.raises(
        UserError, match=r"expected a finite loss of task '\w+', got nan at step 4; the weights have not changed"
    ):
        trainer.train()
    assert_same(before, weights(trainer.model))
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_a_gradient_that_is_not_finite_stops_training_too(tmp_path):
    before = {}

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **kwargs):
            if state.global_step == 2:
                before.update(weights(model))
                weight = model.encoder.embeddings.word_embeddings.weight
                weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = multitask_trainer(tmp_path, callbacks=[Poison()])
    with pytest.raises(UserError, match=r"expected a finite gradient norm, got (nan|inf) at step 3"):
        trainer.train()
    assert_same(before, weights(trainer.model))


def test_the_callback_prunes_inside_a_foreign_trainer(tmp_path):
    model = plain_model()
    rows = tokenized_rows(BINARY, 40)
    batches = [{"input_ids": torch.tensor([r["input_ids"]]), "labels": torch.tensor([r["labels"]])} for r in rows]
    pruner = PruningCallback(PruningConfig(sparsity=0.75, score_batches=5, start_step=2), {"only": batches})
    args = TrainingArguments(
        **{
            k: v
            for k, v in arguments(tmp_path).to_dict().items()
            if k in ("output_dir", "max_steps", "use_cpu", "learning_rate", "weight_decay", "report_to", "disable_tqdm")
        }
    )
    Trainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[pruner]).train()
    parameters = prunable_parameters(model)
    assert sum(int((p == 0).sum()) for p in parameters.values()) == round(
        0.75 * sum(p.numel() for p in parameters.values())
    )
    assert all(torch.equal(p != 0, pruner.masks[name]) for name, p in parameters.items())
    model(**batches[0]).loss.backward()
    assert any((p.grad[p == 0] != 0).any() for p in parameters.values()), "the hooks outlived training"


def test_a_downloaded_sparse_model_learns_a_new_task_with_its_zeros_held(tmp_path):
    trainer = multitask_trainer(tmp_path / "a", PruningConfig(sparsity=0.8, score_batches=1))
    trainer.train()
    trainer.save_model()
    assert PruningConfig.from_pretrained(tmp_path / "a") == trainer.pruning_config
    new = TaskConfig(name="new", columns="text", labels=["a", "b", "c", "d"])
    model = MultitaskModel.from_encoder(str(tmp_path / "a"), [new])
    masks = find_masks(prunable_parameters(model))
    before = weights(model)
    tuner = DisparseTrainer(
        model,
        arguments(tmp_path / "b"),
        masks=masks,
        train_dataset={"new": tokenized_rows(new, 30)},
        processing_class=tiny_tokenizer(),
    )
    tuner.train()
    parameters = prunable_parameters(model)
    assert all(torch.equal(p != 0, masks[name]) for name, p in parameters.items())
    assert any(not torch.equal(p, before[name]) for name, p in parameters.items()), "nothing was learnt"


def test_pruning_goes_on_from_given_masks(tmp_path):
    first = multitask_trainer(tmp_path, PruningConfig(sparsity=0.5, score_batches=1))
    first.train()
    masks = find_masks(prunable_parameters(first.model))
    second = multitask_trainer(tmp_path, PruningConfig(sparsity=0.8, score_batches=1), model=first.model, masks=masks)
    second.train()
    after = find_masks(prunable_parameters(second.model))
    assert not any((after[name] & ~masks[name]).any() for name in masks)
    total = sum(keep.numel() for keep in after.values())
    assert sum(int((~keep).sum()) for keep in after.values()) == round(0.8 * total)


def test_temperature_sampling_reaches_the_sampler(tmp_path):
    trainer = multitask_trainer(tmp_path, task_sampling="temperature", sampling_temperature=1e6, sampling_cap=3)
    sampler = trainer.get_train_dataloader().batch_sampler
    assert (sampler.sampling, sampler.temperature, sampler.cap) == ("temperature", 1e6, 3)

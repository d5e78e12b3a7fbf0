"""DisparseTrainer at its edges: options of Trainer, other ways to call it, what it refuses."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_disparse import (
    DisparseTrainer,
    L0Config,
    MultitaskConfig,
    MultitaskModel,
    PlatonConfig,
    PruningConfig,
    TaskConfig,
    UserError,
    prunable_parameters,
)
from hf_disparse.model.architectures import layout_of
from tests.helpers.tiny import CONFIGS, three_datasets, three_tasks, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, assert_same, multitask_trainer, plain_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train_dataset": three_datasets()["two"]},
            "train_dataset: expected a dict of task -> Dataset, got Dataset. Did you mean",
        ),
        ({"train_dataset": {"tow": three_datasets()["two"]}}, "the model has no task 'tow'; did you mean 'two'"),
        ({"eval_dataset": {"four": []}}, "eval_dataset: the model has no task 'four'"),
        (
            {"pruning_config": PruningConfig(decision="quorum", quorum=4)},
            "quorum: expected at most the number of tasks, 3, got 4",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, changes, words):
    values = dict(train_dataset=three_datasets(), processing_class=tiny_tokenizer()) | changes
    with pytest.raises(UserError, match=words):
        DisparseTrainer(tiny_model(), arguments(tmp_path), **values)


@pytest.mark.parametrize("config", [PruningConfig(start_step=8), PruningConfig(schedule="cubic", end_step=20)])
def test_a_schedule_that_training_cuts_off_is_refused(tmp_path, config):
    with pytest.raises(UserError, match=r"the last pruning is at step .*, training ends at step 8"):
        multitask_trainer(tmp_path, config).train()


def test_an_empty_task_is_refused(tmp_path):
    data = three_datasets()
    trainer = multitask_trainer(tmp_path)
    trainer.train_dataset = data | {"two": data["two"].select([])}
    with pytest.raises(UserError, match=r"tasks\.two: expected at least one example"):
        trainer.train()


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(UserError, match=r"one process per GPU, got one process for 2.*torchrun"):
        multitask_trainer(tmp_path)


def test_persistent_workers_evaluate_every_task_on_its_own_rows(tmp_path):
    plain = multitask_trainer(tmp_path).evaluate()
    workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    found = multitask_trainer(tmp_path, **workers).evaluate()
    assert {k: v for k, v in found.items() if "time" not in k} == {k: v for k, v in plain.items() if "time" not in k}


@pytest.mark.slow
def test_only_tasks_that_are_trained_have_a_say(tmp_path):
    data = three_datasets()
    trainer = DisparseTrainer(
        tiny_model(),
        arguments(tmp_path),
        pruning_config=PruningConfig(sparsity=0.5, decision="quorum", quorum=2, score_batches=1),
        train_dataset={task: data[task] for task in ("three", "real")},
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    zeros = sum(int((~keep).sum()) for keep in trainer.pruner.masks.values())
    assert zeros == round(0.5 * sum(keep.numel() for keep in trainer.pruner.masks.values()))


def test_one_task_is_evaluated_by_its_name(tmp_path):
    trainer = multitask_trainer(tmp_path)
    whole, one = trainer.evaluate(), trainer.evaluate("two")
    assert one["eval_two_accuracy"] == one["eval_average"] == whole["eval_two_accuracy"]
    assert whole["eval_loss"] == pytest.approx(sum(whole[f"eval_{t}_loss"] for t in ("two", "three", "real")) / 3)


@pytest.mark.slow
def test_every_trial_of_a_search_finds_masks_of_its_own(tmp_path):
    seeds, found = iter((1, 1, 2)), []
    trainer = DisparseTrainer(
        None,
        arguments(tmp_path),
        model_init=lambda: tiny_model(seed=next(seeds)),
        pruning_config=PruningConfig(sparsity=0.5, criterion="magnitude"),
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    for _ in range(2):
        trainer.train()
        found.append(trainer.pruner.masks)
    assert any(not torch.equal(keep, found[1][name]) for name, keep in found[0].items())
    for name, p in prunable_parameters(trainer.model).items():
        assert torch.equal(p != 0, found[1][name])


def test_gradients_pass_again_after_training_died(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = multitask_trainer(tmp_path, PruningConfig(sparsity=0.5, score_batches=1), callbacks=[Die()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model(**batch).loss.backward()
    assert any((p.grad[p == 0] != 0).any() for p in prunable_parameters(trainer.model).values())


def test_adapters_are_not_taken_for_weights(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(target_modules=["query"]))
    trainer = DisparseTrainer(
        model,
        arguments(tmp_path),
        pruning_config=PruningConfig(),
        train_dataset=tokenized_rows(BINARY, 8),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(UserError, match="prune before adding them"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: expected random or group_by_length"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: must be 0 with task 'real'"),
        ({"batch_eval_metrics": True}, "leave batch_eval_metrics"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: must be false"),
    ],
)
def test_arguments_that_several_tasks_cannot_follow_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        multitask_trainer(tmp_path, **changes)


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"mpnet"}))  # which transformers has no checkpointing for
def test_scoring_computes_layers_again_where_training_does(tmp_path, kind):
    """Else a GPU that has room for training would run out of memory at the first update; scores stay as they are."""
    masks, calls = [], []
    for changes in ({}, {"gradient_checkpointing": True}):
        torch.manual_seed(0)
        model = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[kind](), tasks=three_tasks()))
        trainer = multitask_trainer(tmp_path, PruningConfig(score_batches=2), model, **changes)
        if changes:
            model.gradient_checkpointing_enable()  # as train() does
        layers = model.encoder.get_submodule(layout_of(model.encoder).layers)
        seen = []
        linear = next(module for module in layers[0].modules() if isinstance(module, nn.Linear))
        linear.register_forward_pre_hook(lambda *args, seen=seen: seen.append(1))
        trainer.pruner.prune(model.train(), step=0)
        assert all(module.training for module in model.modules())
        calls.append(len(seen))
        masks.append(trainer.pruner.masks)
    assert_same(*masks)
    assert calls == [6, 12], "three tasks, two batches"


@pytest.mark.parametrize("config", [L0Config(target_modules=["nothing"]), PruningConfig(target_modules=["nothing"])])
def test_what_is_refused_before_training_began_is_said_as_it_is(tmp_path, config):
    with pytest.raises(UserError, match="no Linear module of the encoder matches"):
        multitask_trainer(tmp_path, config).train()


def test_training_without_data_is_refused(tmp_path):
    trainer = DisparseTrainer(tiny_model(), arguments(tmp_path), processing_class=tiny_tokenizer())
    with pytest.raises(UserError, match="train_dataset: training needs a dict of task -> Dataset"):
        trainer.train()


class OutOfMemory(DisparseTrainer):
    """Has no room for the gradients of its first batch."""

    is_full = True

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.is_full:
            self.is_full = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return loss


@pytest.mark.parametrize(
    "config", [PlatonConfig(sparsity=0.5, end_step=6, update_every=2), L0Config(sparsity=0.5, end_step=6)]
)
def test_a_try_that_ran_out_of_memory_leaves_nothing_to_the_next_one(tmp_path, monkeypatch, config):
    trainer = OutOfMemory(
        tiny_model(),
        arguments(tmp_path, auto_find_batch_size=True),
        pruning_config=config,
        train_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    method, seen = type(trainer.pruner.method), []
    whole = method.gradient
    monkeypatch.setattr(method, "gradient", lambda self, name, *rest: seen.append(name) or whole(self, name, *rest))
    trainer.train()
    parameters = prunable_parameters(trainer.model)
    assert seen == list(dict.fromkeys(seen)) * trainer.backward_passes and set(seen) == set(parameters)
    assert not any(p._backward_hooks for p in parameters.values())
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    assert zeros == sum(p.numel() for p in parameters.values()) // 2, (
        "L0 would have begun with the gates of the first try"
    )


def test_passes_before_a_resume_count_once_though_a_try_after_it_ran_out_of_memory(tmp_path):
    changes = dict(max_steps=4, save_strategy="steps", save_steps=2)
    config = PruningConfig(schedule="cubic", end_step=3, update_every=1, score_batches=1)
    trainer = multitask_trainer(tmp_path, config, **changes)
    trainer.train()
    given = dict(pruning_config=config, train_dataset=three_datasets(), processing_class=tiny_tokenizer())
    retried = OutOfMemory(tiny_model(), arguments(tmp_path, auto_find_batch_size=True, **changes), **given)
    retried.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not retried.is_full and retried.backward_passes == trainer.backward_passes == 4 + 3 * 3


def test_a_label_smoother_leaves_scoring_the_labels(tmp_path, monkeypatch):
    """Of two processes, the other one with one labelled token, a loss counts by its tokens."""
    tasks = [TaskConfig(name="tags", columns="tokens", labels=["O", "X"], problem_type="token_classification")]
    rows = Dataset.from_dict({"input_ids": [[2, 5, 6, 3]], "labels": [[-100, 0, 1, 0]]})
    losses = []
    for processes in (1, 2):
        monkeypatch.setattr("hf_disparse.trainer.trainer.processes", lambda processes=processes: processes)
        monkeypatch.setattr("hf_disparse.trainer.trainer.mean_over_processes", lambda own: [(own[0] + 1) / 2])
        args = arguments(tmp_path, label_smoothing_factor=0.1)
        trainer = DisparseTrainer(
            tiny_model(tasks), args, train_dataset={"tags": rows}, processing_class=tiny_tokenizer()
        )
        batch = next(iter(trainer.get_train_dataloader()))
        mine = int((batch["labels"] != -100).sum())
        losses.append(trainer.scoring_loss(trainer.model.eval(), batch).item())
    assert mine > 1 and losses[1] == pytest.approx(losses[0] * mine / ((mine + 1) / 2))


def test_an_encoder_that_returns_its_hidden_states_is_evaluated_as_any(tmp_path):
    found = []
    for returns in (False, True):
        model = tiny_model()
        model.encoder.config.output_hidden_states = returns
        metrics = multitask_trainer(tmp_path, model=model).evaluate(three_datasets())
        found.append({key: value for key, value in metrics.items() if not key.endswith(("time", "per_second"))})
    assert found[0] == found[1] and "eval_average" in found[0]


def test_evaluation_says_what_it_lacks(tmp_path):
    trainer = multitask_trainer(tmp_path)
    with pytest.raises(UserError, match=r"eval_dataset: there are no rows for a task 'tow'; did you mean 'two'\?"):
        trainer.evaluate("tow")
    with pytest.raises(UserError, match=r"expected the rows of one task, got two, three, real"):
        trainer.get_eval_dataloader()
    trainer.eval_dataset = None
    for call in (trainer.evaluate, trainer.get_eval_dataloader, lambda: trainer.evaluate("two")):
        with pytest.raises(
            UserError, match=r"eval_dataset: expected a dict of task -> Dataset to evaluate on, got None"
        ):
            call()

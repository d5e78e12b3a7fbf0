"""Training with teachers, uncertainty weights and gradient surgery: what a step does, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, TrainingArguments

from hf_disparse import DisparseTrainer, PruningConfig, TaskConfig, UserError
from tests.helpers.losses import (
    MASK,
    REAL,
    SHAPES,
    TOKENS,
    by_hand,
    generator,
    hidden_by_hand,
    project,
    some_labels,
    vector,
)
from tests.helpers.resuming import CUBIC, STEPS, DieAt, Died, slow
from tests.helpers.tiny import three_datasets, three_tasks, tiny_bert_config, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, assert_same, plain_model, weights


def trainer_of(folder, teachers=None, model=None, data=None, pruning=None, **changes) -> DisparseTrainer:
    given = dict(teachers=teachers, pruning_config=pruning, processing_class=tiny_tokenizer())
    given |= dict(args=arguments(folder, **changes), train_dataset=data or three_datasets())
    return DisparseTrainer(model or tiny_model(), **given)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def bert(classes: int, **changes) -> BertForSequenceClassification:
    config = tiny_bert_config()
    for key, value in {**changes, "num_labels": classes}.items():
        setattr(config, key, value)
    return BertForSequenceClassification(config)


def relabelled(labels: list[str]) -> list[TaskConfig]:
    """The three tasks, the first one's classes in another order or with other names."""
    return [TaskConfig(name="two", columns="text", labels=labels), *three_tasks()[1:]]


def watch(trainer, look) -> None:
    """Calls `look(model, batch, loss)` for every training batch before the weights change."""
    compute = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        batch = dict(inputs)
        loss = compute(model, inputs, *args, **kwargs)
        look(model, batch, loss)
        return loss

    trainer.compute_loss = watched


@pytest.mark.parametrize(("problem", "smoothing"), [*((problem, 0.0) for problem in SHAPES), (TOKENS, 0.1)])
def test_the_loss_mixes_labels_teacher_and_hidden_states_as_asked(tmp_path, problem, smoothing):
    names = [] if problem == REAL else ["a", "b", "c", "d"]
    tasks = [TaskConfig(name="one", columns="text", problem_type=problem, labels=names, weight=2.5)]
    model, teacher = without_dropout(tiny_model(tasks)), tiny_model(tasks, seed=1)
    changes = dict(distillation=0.3, distillation_temperature=3.0, distillation_hidden=0.7)
    rows = {"one": tokenized_rows(BINARY, 8)}
    trainer = trainer_of(tmp_path, teacher, model, rows, label_smoothing_factor=smoothing, **changes)
    ids = torch.randint(4, 44, (3, 6), generator=generator(3))
    batch = {"input_ids": ids, "attention_mask": MASK, "labels": some_labels(problem), "task": "one"}
    ours = trainer.compute_loss(model.train(), dict(batch)).item()
    told, said = (m.eval()(**batch, output_hidden_states=True) for m in (teacher, model))
    loss = said.loss.item()
    if smoothing:  # tokens after classes is how torch wants them
        loss = nn.functional.cross_entropy(said.logits.mT, batch["labels"], label_smoothing=smoothing).item()
    soft = by_hand(said.logits, told.logits, problem, 3.0)
    apart = hidden_by_hand(said.hidden_states, told.hidden_states)
    assert ours == pytest.approx(2.5 * (0.7 * loss + 0.3 * soft + 0.7 * apart), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    losses = []
    for share in (0.0, 1.0):
        model = without_dropout(tiny_model())
        changes = dict(distillation=share, distillation_hidden=share, task_sampling="round_robin", max_steps=1)
        logs = dict(gradient_accumulation_steps=3, logging_strategy="steps", logging_steps=1)
        trainer = trainer_of(tmp_path, copy.deepcopy(model), model, **changes, **logs)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] > 0.1 and abs(losses[1]) < 1e-6


def test_a_teacher_is_asked_in_the_precision_of_training(tmp_path):
    model, teacher, seen = tiny_model(), tiny_model(seed=1), []
    for one in (model, teacher):
        linear = one.encoder.encoder.layer[0].output.dense
        linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer_of(tmp_path, teacher, model, bf16=True, distillation=0.5, max_steps=1).train()
    assert seen == [torch.bfloat16] * 2


def test_one_teacher_of_all_tasks_and_one_for_each_teach_the_same(tmp_path):
    """And a teacher is left as it was: same weights, no gradients, no dropout."""
    teacher, single, plain = tiny_model(seed=5), {}, {}
    for name, task in teacher.tasks.items():
        head, shared = teacher.heads[name].state_dict(), teacher.encoder.state_dict()
        single[name], plain[name] = tiny_model([task]), bert(task.num_labels)
        single[name].encoder.load_state_dict(shared)
        single[name].heads[name].load_state_dict(head)
        plain[name].load_state_dict({f"bert.{n}": tensor for n, tensor in shared.items()} | head)
    teaching = [teacher, *single.values(), *plain.values()]
    before, runs = [weights(model) for model in teaching], []
    for teachers, share in ((None, 0.0), (teacher, 0.5), (single, 0.5), (plain, 0.5)):
        trainer = trainer_of(tmp_path, teachers, distillation=share, distillation_hidden=share)
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(runs[1], runs[2])
    assert_same(runs[1], runs[3])
    assert any(not torch.allclose(tensor, runs[1][name], atol=1e-3) for name, tensor in runs[0].items())
    for model, weights_ in zip(teaching, before, strict=True):
        assert_same(weights_, weights(model))
        assert not any(module.training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_evaluation_and_scores_are_of_the_labels(tmp_path):
    """The distance to a teacher that is the student would be zero, and so would all scores."""
    found = []
    for changes in ({}, {"distillation": 1.0, "loss_weighting": "uncertainty"}):
        trainer = trainer_of(tmp_path, tiny_model(), pruning=PruningConfig(score_batches=2), **changes)
        metrics = trainer.evaluate(three_datasets(30, seed=9))
        trainer.pruner.prune(trainer.model.train(), step=0)
        assert trainer.loss_means == {}
        found.append((trainer.pruner.masks, {k: v for k, v in metrics.items() if k.endswith(("loss", "average"))}))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: None, "there is no teacher for task 'two'; pass teachers="),
        (lambda: {"three": bert(3), "real": bert(1)}, "there is no teacher for task 'two'"),
        (lambda: tiny_model(three_tasks()[:2]), "there is no teacher for task 'real'"),
        (
            lambda: tiny_model(relabelled(["yes", "no"])),
            r"teachers.two: expected a teacher with the task's labels, .*'no', 'yes'",
        ),
        (lambda: {"two": tiny_model(relabelled(["a", "b"])), "three": bert(3), "real": bert(1)}, "teachers.two: "),
        (lambda: dict.fromkeys(("two", "three", "real"), bert(5)), r"classes of task '\w+', got logits of \(4, 5\)"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path, make(), distillation=0.5).train()


def test_a_plain_teacher_with_the_classes_in_another_order_is_refused(tmp_path):
    def teach(names):
        teacher = bert(2)
        teacher.config.id2label = dict(enumerate(names))
        return trainer_of(tmp_path, {"two": teacher}, data={"two": tokenized_rows(BINARY, 8)}, distillation=0.5)

    no, yes = BINARY.labels
    with pytest.raises(UserError, match=r"teachers\.two: expected a teacher with the classes .* in this order, got"):
        teach([yes.upper(), no.upper()])
    for names in ([no, yes.upper()], ["LABEL_0", "LABEL_1"]):
        teach(names).train()


def test_uncertainty_divides_by_the_running_mean_of_the_tasks_loss(tmp_path):
    tasks = [TaskConfig(name="two", columns="text", labels=["no", "yes"], weight=2.5), *three_tasks()[1:]]
    model = without_dropout(tiny_model(tasks))
    trainer = trainer_of(tmp_path, model=model, loss_weighting="uncertainty", gradient_accumulation_steps=2)
    means, ratios = {}, []

    def look(model, batch, loss):
        own, task = copy.deepcopy(model).eval()(**batch).loss.item(), batch["task"]
        means[task] = own if task not in means else means[task] + (own - means[task]) / 100
        ratios.append(loss.item() / (own / means[task] * (2.5 if task == "two" else 1.0)))

    watch(trainer, look)
    trainer.train()
    assert ratios == pytest.approx([1.0] * 16, rel=1e-4)
    assert trainer.loss_means == pytest.approx(means, rel=1e-4)
    assert set(means) == {"two", "three", "real"}


def test_a_step_of_pcgrad_is_the_one_from_per_task_gradients(tmp_path):
    """Six batches, two of each task; SGD, so that the step is the gradient; heads are no matter of PCGrad."""
    model = without_dropout(tiny_model(seed=1))  # where two tasks conflict and their order matters
    changes = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=0.0, task_sampling="round_robin")
    changes |= dict(loss_weighting="pcgrad", gradient_accumulation_steps=6, max_steps=1, seed=3)
    trainer, start, total = trainer_of(tmp_path, model=model, **changes), copy.deepcopy(model).eval(), {}

    def look(model, batch, loss):
        start.zero_grad()
        (start(**batch).loss / 6).backward()
        total[batch["task"]] = total.get(batch["task"], 0) + vector(start.parameters())

    watch(trainer, look)
    trainer.train()
    gradients, plain_sum = np.array(list(total.values())), sum(total.values())
    shared = np.array([n.startswith("encoder.") for n, p in start.named_parameters() for _ in range(p.numel())])
    step = np.where(shared, project(gradients * shared, 3), plain_sum)
    others = [plain_sum[shared], *(project(gradients[:, shared], seed) for seed in (2, 4))]
    assert all(np.abs(step[shared] - other).max() > 1e-4 for other in others), "this proves nothing"
    old, new = (torch.cat([p.detach().flatten() for p in m.parameters()]).double().numpy() for m in (start, model))
    np.testing.assert_allclose(old - new, 0.5 * step, rtol=1e-3, atol=1e-6)


def test_what_a_plain_model_or_lone_batches_cannot_follow_is_refused(tmp_path, monkeypatch):
    def plain(**changes):
        DisparseTrainer(plain_model(), arguments(tmp_path, **changes), train_dataset=tokenized_rows(BINARY, 8))

    with pytest.raises(UserError, match=r"training\.distillation: only a MultitaskModel"):
        plain(distillation=0.5)
    words = "pcgrad needs several tasks in a step, .* gradient_accumulation_steps of at least 2, in one process"
    with pytest.raises(UserError, match=words):
        plain(loss_weighting="pcgrad", gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path, loss_weighting="pcgrad")
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path, loss_weighting="pcgrad", gradient_accumulation_steps=2)


UNCERTAINTY, PCGRAD = ({"loss_weighting": way} for way in ("uncertainty", "pcgrad"))


@pytest.mark.parametrize("step", [7, *slow(19)])
@pytest.mark.parametrize(
    "changes", [UNCERTAINTY, *slow(PCGRAD, {"distillation": 0.5, "distillation_hidden": 0.1})], ids=str
)
def test_a_killed_run_ends_in_the_bits_of_the_undisturbed_one(tmp_path, changes, step):
    """Checkpoints are at 6, while the masks grow, and at 18, in the second epoch."""

    def trainer(folder):
        return trainer_of(tmp_path / folder, tiny_model(seed=8), pruning=CUBIC, **STEPS | changes)

    whole = trainer("whole")
    whole.train()
    assert bool(whole.loss_means) == (changes == UNCERTAINTY)
    killed, again = trainer("killed"), trainer("killed")
    killed.add_callback(DieAt(step))
    with pytest.raises(Died):
        killed.train()
    torch.manual_seed(99)  # what the new process did before must not matter
    again.train(resume_from_checkpoint=True)
    assert_same(weights(whole.model), weights(again.model))
    assert again.loss_means == whole.loss_means


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("loss_weighting", "pcgard", "unknown value 'pcgard'; did you mean 'pcgrad'"),
        ("loss_weighting", None, "expected one of: fixed, uncertainty, pcgrad"),
        *(("distillation", v, r"expected a number in \[0, 1\]") for v in (-0.1, 1.01, float("nan"), True, "0.5", None)),
        *(("distillation_temperature", v, "expected a number above 0") for v in (0, -1.0, float("inf"), True, "2")),
        *(("distillation_hidden", v, "expected a number of at least 0") for v in (-1e-9, float("inf"), False, [1.0])),
    ],
)
def test_arguments_refuse_nonsense(tmp_path, key, value, words):
    with pytest.raises(UserError, match=f"^{key}: .*{words}"):
        arguments(tmp_path, **{key: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(2),
        lambda: {"two": tiny_model([TaskConfig(name="other", columns="text", labels=["a", "b"])])},
        lambda: {"two": bert(2, hidden_size=32)},
        lambda: {"two": bert(2, num_hidden_layers=3)},
    ],
)
def test_a_teacher_of_another_kind_is_refused_in_a_line(tmp_path, make):
    with pytest.raises(UserError, match="teacher"):
        trainer_of(tmp_path, make(), data={"two": tokenized_rows(BINARY, 8)}, distillation_hidden=1.0).train()


def test_evaluation_without_training_data_needs_no_teacher(tmp_path):
    """As in `hf-disparse evaluate` on a recipe that distils."""
    args = arguments(tmp_path, distillation=0.5)
    metrics = DisparseTrainer(tiny_model(), args, processing_class=tiny_tokenizer()).evaluate(three_datasets())
    assert {f"eval_{task.name}_loss" for task in three_tasks()} <= metrics.keys()


def test_a_step_that_died_leaves_no_gradients_to_the_next_training(tmp_path):
    changes = dict(loss_weighting="pcgrad", gradient_accumulation_steps=2)
    trainer, fresh, seen = trainer_of(tmp_path, **changes), trainer_of(tmp_path, **changes), []

    def die_in_the_second_batch(model, batch, loss):
        seen.append(batch)
        if len(seen) == 2:
            raise Died

    watch(trainer, die_in_the_second_batch)
    with pytest.raises(Died):
        trainer.train()
    for one in (trainer, fresh):
        torch.manual_seed(1)
        one.train()
    assert_same(weights(fresh.model), weights(trainer.model))


@pytest.mark.slow
@pytest.mark.parametrize("way", [UNCERTAINTY, PCGRAD])
def test_a_try_that_ran_out_of_memory_leaves_no_gradients_and_no_means_to_the_next_one(tmp_path, way):
    """The next try is a training that began with its smaller batches."""
    changes, seen = way | dict(gradient_accumulation_steps=2), []
    model = without_dropout(tiny_model())
    trainer = trainer_of(tmp_path, model=model, auto_find_batch_size=True, **changes)

    def no_room_for_the_second_batch(model, batch, loss):
        seen.append(batch)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    watch(trainer, no_room_for_the_second_batch)
    trainer.train()
    sizes = [len(batch["labels"]) for batch in (seen[0], seen[-1])]
    assert sizes[0] > sizes[1], "this proves nothing"
    model = without_dropout(tiny_model())
    fresh = trainer_of(tmp_path, model=model, per_device_train_batch_size=sizes[1], **changes)
    fresh.train()
    assert_same(weights(fresh.model), weights(trainer.model))
    assert fresh.backward_passes == trainer.backward_passes and fresh.loss_means == trainer.loss_means


def test_every_trial_of_a_search_starts_its_means_anew(tmp_path):
    args = arguments(tmp_path, loss_weighting="uncertainty")
    given = dict(model_init=lambda: tiny_model(), train_dataset=three_datasets(), processing_class=tiny_tokenizer())
    trainer, runs = DisparseTrainer(None, args, **given), []
    for _ in range(2):
        trainer.train()
        runs.append(weights(trainer.model))
    assert_same(*runs)

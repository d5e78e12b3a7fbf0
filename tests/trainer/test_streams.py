"""Rows that are read as they come: every process its part, in turn by task, and a resume to the bit."""

from itertools import islice

import pytest
from datasets import IterableDataset

from hf_disparse import DisparseTrainer, PruningConfig, UserError, last_whole_checkpoint
from hf_disparse.tasks.batches import TaskStream, blocks_of
from tests.helpers.resuming import DieAt, Died, slow
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer, tokenized_rows
from tests.helpers.training import BINARY, arguments, assert_same, plain_model, weights

CUBIC = PruningConfig(sparsity=0.8, schedule="cubic", start_step=2, end_step=16, update_every=4, score_batches=2)


def streams(shuffled: bool = True) -> dict[str, IterableDataset]:
    rows = {task: dataset.to_iterable_dataset() for task, dataset in three_datasets().items()}
    return {task: r.shuffle(seed=3, buffer_size=16) for task, r in rows.items()} if shuffled else rows


def stream_trainer(folder, callbacks=(), rows=None, **changes) -> DisparseTrainer:
    values = dict(max_steps=20, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
    return DisparseTrainer(
        tiny_model(),
        arguments(folder, **values | {"task_sampling": "round_robin"} | changes),
        pruning_config=CUBIC,
        train_dataset=rows or streams(),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def test_tasks_come_in_turn_and_every_row_before_any_comes_again():
    first = list(islice(TaskStream(streams(), 4), 3 * 8))
    assert [batch[0]["task"] for batch in first] == ["two", "three", "real"] * 8
    seen = [tuple(row["input_ids"]) for batch in first[1::3] for row in batch]
    rows = [tuple(ids) for ids in three_datasets()["three"]["input_ids"]]
    assert sorted(seen[: len(rows)]) == sorted(rows)
    assert seen[len(rows) :] != seen[: len(seen) - len(rows)]  # another epoch, another order


def test_the_parts_of_the_processes_are_the_batches_of_one():
    one = islice(TaskStream(streams(), 6), 9)
    parts = [TaskStream(streams(), 2, rank, 3) for rank in range(3)]
    for whole, *mine in zip(one, *parts, strict=False):
        assert all(len(part) == 2 for part in mine)
        together = [row["input_ids"] for part in mine for row in part]
        assert sorted(together) == sorted(row["input_ids"] for row in whole)
        assert {row["task"] for part in mine for row in part} == {whole[0]["task"]}


def test_blocks_begin_anew_and_an_empty_stream_is_refused():
    assert list(islice(blocks_of([1, 2, 3], 2, "here"), 3)) == [[1, 2], [3, 1], [2, 3]]
    with pytest.raises(UserError, match=r"tasks\.t: expected at least one example, got none"):
        next(blocks_of([], 2, "tasks.t"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = stream_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def test_training_prunes_exactly_and_scores_on_other_rows_at_every_update(undisturbed):
    masks = undisturbed.pruner.masks
    size = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.8 * size)
    parameters = dict(undisturbed.model.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in masks.items())
    seen = []
    for step in (2, 6):
        undisturbed.state.global_step = step
        seen.append([batch["input_ids"].tolist() for batch in islice(undisturbed.pruner.loaders["two"], 2)])
    assert seen[0] != seen[1]


@pytest.mark.parametrize("step", [7, *slow(4, 14)])
def test_a_killed_run_on_streams_ends_in_the_bits_of_the_undisturbed_one(tmp_path, undisturbed, step):
    with pytest.raises(Died):
        stream_trainer(tmp_path, [DieAt(step)]).train()
    assert last_whole_checkpoint(tmp_path)
    trainer = stream_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(undisturbed.model), weights(trainer.model))
    assert_same(undisturbed.pruner.masks, trainer.pruner.masks)


def test_a_model_of_one_task_is_scored_on_its_stream(tmp_path):
    rows = tokenized_rows(BINARY, 24).to_iterable_dataset()
    one_shot = PruningConfig(sparsity=0.5, score_batches=2)
    trainer = DisparseTrainer(
        plain_model(),
        arguments(tmp_path, max_steps=2),
        pruning_config=one_shot,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    zeros = sum(int((~mask).sum()) for mask in trainer.pruner.masks.values())
    assert zeros == sum(mask.numel() for mask in trainer.pruner.masks.values()) // 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_sampling": "proportional"}, "training.task_sampling: expected round_robin with streams"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "training.train_sampling_strategy: expected random with streams",
        ),
        ({"max_steps": -1}, "training.max_steps: must be set with streams"),
        ({"dataloader_num_workers": 2}, "training.dataloader_num_workers: must be 0 with streams"),
        ({"rows": {**streams(), "two": three_datasets()["two"]}}, "expected streams for all tasks or for none"),
    ],
)
def test_what_streams_cannot_do_is_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        stream_trainer(tmp_path, **changes).get_train_dataloader()


def test_rows_of_streams_are_not_all_in_memory(tmp_path):
    """A stream of ten million rows, of which a training of two steps reads what it needs."""
    read = []

    def rows(task: int):
        for i in range(10_000_000):
            read.append(i)
            yield {
                "input_ids": [2, 4 + (i + task) % 40, 3],
                "attention_mask": [1, 1, 1],
                "labels": i % 2 if task < 2 else 0.5,
            }

    huge = {
        name: IterableDataset.from_generator(rows, gen_kwargs={"task": i}) for i, name in enumerate(three_datasets())
    }
    stream_trainer(tmp_path, rows=huge, max_steps=18, save_strategy="no").train()
    assert 0 < len(read) < 2_000

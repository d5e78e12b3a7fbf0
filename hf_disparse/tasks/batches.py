"""One task per batch: the joined data set, the seeded sampler over tasks, streams in turn, and the collator."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_disparse.config import TaskConfig, UserError, closest, require

SAMPLING = ("proportional", "temperature", "round_robin")
_CHUNK = 50  # blocks of similar length are found among so many, as in transformers' LengthGroupedSampler


class TaskDataset(Dataset):
    """The data sets of several tasks end to end; an item is a row of one of them with its `task` added.

    Args:
        datasets: task -> rows (dictionaries), by position.
    """

    def __init__(self, datasets: Mapping[str, Sequence[Mapping[str, Any]]]):
        self.datasets = dict(datasets)
        self.sizes = {task: len(rows) for task, rows in self.datasets.items()}
        for task, size in self.sizes.items():
            if size == 0:
                raise UserError(f"tasks.{task}: expected at least one example, got none")

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            index += len(self)
        for task, size in self.sizes.items():
            if 0 <= index < size:
                return {**self.datasets[task][index], "task": task}
            index -= size
        raise IndexError(index)


class TaskBatchSampler:
    """Batches of indices into a `TaskDataset`, all of one task and all full, in an order that (seed, epoch) fixes.

    An epoch has as many batches as the tasks' examples fill; with `round_robin`, as the largest task's fill times the tasks. The
    next task is drawn
    - `proportional`: each task as often as its examples fill batches, so that an epoch sees every example;
    - `temperature`: with probability ~ min(size, cap) ** (1 / temperature);
    - `round_robin`: in turn, small tasks starting over until the largest is through.
    A task's examples come in a fresh random order each time it starts over. Given their `lengths` (task -> one per
    example), examples of similar length meet in a batch, which halves the tokens of GLUE's padded ones. With several processes
    every task comes in blocks of `world_size` batches, for Accelerate hands batch i to rank i mod world_size.

    It has no attribute `batch_size`, on purpose: Accelerate would drop blocks by it.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        sampling: str = "proportional",
        temperature: float = 1.0,
        cap: int | None = None,
        lengths: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
        world_size: int = 1,
    ):
        if sampling not in SAMPLING:
            raise UserError(f"task_sampling: unknown value {sampling!r}{closest(sampling, SAMPLING)}")
        if not temperature >= 1:
            raise UserError(f"sampling_temperature: expected a number of at least 1, got {temperature!r}")
        if cap is not None and cap < 1:
            raise UserError(f"sampling_cap: expected a whole number of at least 1, got {cap!r}")
        for key, value in {**sizes, "batch_size": batch_size, "world_size": world_size}.items():
            require(value >= 1, key, "at least one", value)
        self.sizes, self.sampling, self.temperature, self.cap = dict(sizes), sampling, temperature, cap
        self.lengths, self.seed, self.world_size, self.epoch = lengths, seed, world_size, 0
        self._rows = batch_size
        self._blocks = {task: -(-size // (batch_size * world_size)) for task, size in self.sizes.items()}

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.sampling == "round_robin":
            return max(self._blocks.values()) * len(self._blocks) * self.world_size
        return sum(self._blocks.values()) * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        tasks = list(self.sizes)
        first = dict(zip(tasks, torch.tensor([0, *self.sizes.values()]).cumsum(0).tolist(), strict=False))
        rows = {task: self._endless(task, generator) for task in tasks}
        if self.lengths is not None:
            rows = {task: self._grouped(task, rows[task], generator) for task in tasks}
        for task in self._order(generator):
            for _ in range(self.world_size):
                yield [first[task] + i for i in islice(rows[task], self._rows)]

    def _endless(self, task: str, generator: torch.Generator) -> Iterator[int]:
        """A task's rows in random order, over and over; an order is drawn when its first row is needed."""
        while True:
            yield from torch.randperm(self.sizes[task], generator=generator).tolist()

    def _grouped(self, task: str, rows: Iterator[int], generator: torch.Generator) -> Iterator[int]:
        """The same rows, sorted by length within chunks of blocks; the blocks of a chunk come in random order."""
        block, lengths = self._rows * self.world_size, self.lengths[task]
        while True:
            for start in range(0, self._blocks[task], _CHUNK):  # chunks end where an epoch of the task does
                count = min(_CHUNK, self._blocks[task] - start)
                chunk = sorted(islice(rows, count * block), key=lengths.__getitem__)
                for i in torch.randperm(count, generator=generator).tolist():
                    yield from chunk[i * block : (i + 1) * block]

    def _order(self, generator: torch.Generator) -> list[str]:
        """The tasks of one epoch's blocks."""
        tasks = list(self.sizes)
        count = len(self) // self.world_size
        if self.sampling == "round_robin":
            return tasks * (count // len(tasks))
        if self.sampling == "temperature":
            cap = self.cap or max(self.sizes.values())
            chances = torch.tensor([min(size, cap) ** (1 / self.temperature) for size in self.sizes.values()])
            return [tasks[i] for i in torch.multinomial(chances, count, replacement=True, generator=generator)]
        blocks = [task for task in tasks for _ in range(self._blocks[task])]
        return [blocks[i] for i in torch.randperm(count, generator=generator)]


class TaskStream(IterableDataset):
    """Batches of rows of one task each, the tasks in turn, from streams that need not fit into memory; it never ends.

    A stream that ends begins anew, in its next epoch if it counts them (`set_epoch`, as those of the datasets library do). It
    must give the same rows every time for a resume to be exact. Of several processes each reads all rows and takes its part.

    Args:
        streams: task -> rows (dictionaries), to be iterated as often as needed.
        batch_size: rows of a batch on one process.
    """

    def __init__(
        self, streams: Mapping[str, Iterable[Mapping[str, Any]]], batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.streams, self._rows, self._rank, self._world_size = dict(streams), batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        blocks = {
            task: blocks_of(stream, self._rows * self._world_size, f"tasks.{task}")
            for task, stream in self.streams.items()
        }
        while True:
            for task, rows in blocks.items():
                yield [{**row, "task": task} for row in next(rows)[self._rank :: self._world_size]]


def blocks_of(stream: Iterable[Mapping[str, Any]], size: int, where: str, epoch: int = 0) -> Iterator[list]:
    """Lists of `size` rows of a stream that begins anew, in the next epoch, when it ends."""

    def rows() -> Iterator[Mapping[str, Any]]:
        for now in count(epoch):
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(now)
            empty = True
            for row in stream:
                empty = False
                yield row
            if empty:
                raise UserError(f"{where}: expected at least one example, got none")

    endless = rows()
    while True:
        yield list(islice(endless, size))


class MultitaskCollator:
    """Pads rows of one task to a batch and adds the task's name, as `MultitaskModel.forward` takes it.

    Args:
        tokenizer: pads inputs; without one the rows must be of one length.
        tasks: task -> TaskConfig; the problem type decides how labels are padded and typed.
        pad: a data collator of the user's own, called in place of transformers'.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, tasks: Mapping[str, TaskConfig], pad: Callable | None = None
    ):
        self.tasks = dict(tasks)
        with_tokenizer = (DataCollatorWithPadding, DataCollatorForTokenClassification)
        own = pad or (default_data_collator if tokenizer is None else None)  # as Trainer does it
        self._pad, self._pad_tokens = (own or collator(tokenizer) for collator in with_tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | str]:
        """Rows with `task`, `input_ids`, ..., `labels` -> a batch of tensors, `task` a string."""
        task = rows[0]["task"]
        assert all(row["task"] == task for row in rows), "a batch holds one task"
        problem = self.tasks[task].problem_type
        pad = self._pad_tokens if problem == "token_classification" else self._pad
        batch = dict(pad([{k: v for k, v in row.items() if k != "task"} for row in rows]))
        if "labels" in batch:
            is_float = problem in ("regression", "multi_label_classification")
            batch["labels"] = batch["labels"].float() if is_float else batch["labels"].long()
        return {**batch, "task": task}

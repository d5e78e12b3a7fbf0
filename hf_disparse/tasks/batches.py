"""One task per batch: the joined data set, the seeded sampler over tasks, streams that take turns, and the collator."""

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
_CHUNK = 50  # blocks are sorted by length within chunks of so many, as in transformers' LengthGroupedSampler


class TaskDataset(Dataset):
    """Concatenates the data sets of several tasks; an item is a row with its `task` added.

    Args:
        datasets: task -> rows (dictionaries), indexed from 0.
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
    """Full batches of indices into a `TaskDataset`, each of one task, in an order that depends on (seed, epoch) alone.

    An epoch has as many batches as all examples fill; with `round_robin`, the largest task's batches times the number of
    tasks. The next task is chosen
    - `proportional`: each as often as its examples fill batches, so that an epoch sees every example;
    - `temperature`: with probability ~ min(size, cap) ** (1 / temperature);
    - `round_robin`: in turn, small tasks starting over until the largest is done.
    A task's examples are shuffled again each time it starts over. Given `lengths` (task -> one per example), batches hold
    examples of similar length, which halves the padded tokens of GLUE. With several processes every task comes in blocks of
    `world_size` batches, because Accelerate gives batch i to rank i mod world_size.

    It has no attribute `batch_size` on purpose, because Accelerate would use it to drop blocks.
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
        """Sets the epoch of the next iteration."""
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
        """A task's rows in random order, over and over; each order is drawn when its first row is needed."""
        while True:
            yield from torch.randperm(self.sizes[task], generator=generator).tolist()

    def _grouped(self, task: str, rows: Iterator[int], generator: torch.Generator) -> Iterator[int]:
        """The same rows, sorted by length within chunks of blocks; the blocks of a chunk come in random order."""
        block, lengths = self._rows * self.world_size, self.lengths[task]
        while True:
            for start in range(0, self._blocks[task], _CHUNK):  # chunks do not cross epochs of the task
                count = min(_CHUNK, self._blocks[task] - start)
                chunk = sorted(islice(rows, count * block), key=lengths.__getitem__)
                for i in torch.randperm(count, generator=generator).tolist():
                    yield from chunk[i * block : (i + 1) * block]

    def _order(self, generator: torch.Generator) -> list[str]:
        """The task of every block in one epoch."""
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
    """Endless batches of one task each, the tasks in turn, from streams that need not fit into memory.

    A stream that ends starts over, in its next epoch if it has `set_epoch`, as in the datasets library. It must give the same
    rows every time for a resume to be exact. With several processes, each reads all rows and takes its share.

    Args:
        streams: task -> rows (dictionaries), which can be iterated repeatedly.
        batch_size: rows per batch on one process.
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
    """Yields lists of `size` rows of a stream, which starts over in the next epoch when it ends."""

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
    """Pads rows of one task to a batch and adds the task's name, as `MultitaskModel.forward` expects.

    Args:
        tokenizer: pads the inputs; without one, all rows must have the same length.
        tasks: task -> TaskConfig; the problem type decides how labels are padded and typed.
        pad: the user's own data collator, used in place of transformers'.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, tasks: Mapping[str, TaskConfig], pad: Callable | None = None
    ):
        self.tasks = dict(tasks)
        with_tokenizer = (DataCollatorWithPadding, DataCollatorForTokenClassification)
        own = pad or (default_data_collator if tokenizer is None else None)  # as in Trainer
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

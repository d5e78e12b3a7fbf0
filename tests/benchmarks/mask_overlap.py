"""How many scoring batches a stable mask needs: the overlap of masks scored on different examples.

    python tests/benchmarks/mask_overlap.py runs/glue_minilm_90-compare/dense-seed1 recipes/glue_minilm_90.yaml

Takes about as long as tasks x criteria x 4 x sum(--batches) training steps, a step being a forward and a backward pass.

Scores every task of a dense model twice, on batches that share no example if the task has enough of them. Prints the
intersection over union of the two keep masks by criterion, decision and number of batches. Random masks that keep a share p of
the weights overlap by p / (2 - p).
"""

import argparse
from collections.abc import Iterator
from itertools import islice

import torch
from rich.console import Console
from rich.table import Table

from hf_disparse import MultitaskModel, PruningConfig, prunable_parameters, score
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.rules import decide_by
from hf_disparse.recipes.recipe import read_recipe
from hf_disparse.runs.setup import prepare
from hf_disparse.tasks.batches import MultitaskCollator, TaskBatchSampler, TaskDataset
from hf_disparse.trainer.arguments import cpu_has_bfloat16

CRITERIA, DECISIONS = ("snip", "disparse", "fisher"), ("unanimous", "sum", "max", "mean_rank", "joint")


def overlap(one: Masks, other: Masks) -> float:
    """Intersection over union of the weights that two masks keep."""
    both = sum(int((keep & other[name]).sum()) for name, keep in one.items())
    either = sum(int((keep | other[name]).sum()) for name, keep in one.items())
    return both / either


def batches(task: str, rows, collate, size: int, seed: int, skip: int, count: int) -> Iterator[dict]:
    """Yields `count` batches of one seeded order, after the first `skip`."""
    rows = TaskDataset({task: rows})
    lengths = {task: [len(ids) for ids in rows.datasets[task]["input_ids"]]}
    sampler = TaskBatchSampler(rows.sizes, size, lengths=lengths, seed=seed)
    for indices in islice(sampler, skip, skip + count):
        yield collate([rows[i] for i in indices])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a dense MultitaskModel")
    parser.add_argument("recipe", help="a recipe with its tasks, data and batch size")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe, options.set)
    model = MultitaskModel.from_pretrained(options.model).eval()
    tokenizer, data, _ = prepare(recipe, splits=("train",))
    rows = {task: data["train"][task] for task in model.tasks}
    collate, size = MultitaskCollator(tokenizer, model.tasks), recipe.sparse.train_batch_size
    parameters = prunable_parameters(model)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            return model(**batch).loss

    table = Table("criterion", "decision", *[f"{n} batches" for n in options.batches], title=f"{options.sparsity:.0%}")
    for criterion in options.criteria:
        masks = {}
        for count in options.batches:
            for half in (0, 1):
                loaders = {t: list(batches(t, rows[t], collate, size, 0, half * count, count)) for t in model.tasks}
                keywords = dict(parameters=parameters, num_batches=None, loss_fn=loss, progress=True)
                scores = dict(score(model, loaders, criterion, **keywords))
                for decision in DECISIONS:
                    if decision == "joint":  # the last one
                        scores = score(model, loaders, criterion, joint=True, **keywords)
                    config = PruningConfig(sparsity=options.sparsity, decision=decision)
                    masks[decision, count, half] = decide_by(config, scores, options.sparsity)
        for decision in DECISIONS:
            values = [overlap(masks[decision, n, 0], masks[decision, n, 1]) for n in options.batches]
            table.add_row(criterion, decision, *[f"{value:.3f}" for value in values])
        Console().print(table)


if __name__ == "__main__":
    main()

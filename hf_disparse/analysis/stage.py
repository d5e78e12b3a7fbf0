"""All measures of one model, task by task: what is kept of a task's gradients once its backward passes are done.

Of a task stay its own mask (one byte a weight), a sample of its scores and of what each batch adds to them, a sketch of its
gradient, and its scores of heads and neurons. Two buffers of the weights' size are needed while it is scored.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.affinity import gradient_cosine, shared_importance, sketch
from hf_disparse.analysis.agreement import WHOLE, Tally, by_layer, overlaps, tally
from hf_disparse.analysis.bootstrap import DRAWS, SAMPLE, Sampled, bootstrap, draw_sample, take, with_intervals
from hf_disparse.analysis.keepers import Sites, keepers, part_scores, parts
from hf_disparse.analysis.own_masks import own_mask
from hf_disparse.analysis.watershed import watershed
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.scores import GRADIENT_CRITERIA

Tensors = Mapping[str, Tensor]
# (task, its gradients batch by batch), as `scores.gradients` yields them
Gradients = Iterable[tuple[str, Iterable[Tensors]]]


@dataclass(frozen=True)
class Evidence:
    """What is kept of one task.

    Args:
        keep: the mask it would have alone.
        scores: parameter name -> (n,), its scores of the sampled weights.
        sampled: what each scoring batch adds to the scores of the sampled weights.
        gradient: a sketch of the sum of its gradients.
        parts: its scores of the parts: kind -> site -> (parts,).
    """

    keep: Masks
    scores: Tensors
    sampled: Sampled
    gradient: Tensors
    parts: Mapping[str, Mapping[str, Tensor]]


class Examination:
    """Looks at the tasks of one model as they stream by, then measures.

    Args:
        weights: the prunable weights by name, as they are while the tasks score. Zeros are out: the masks are of what is live.
        criterion: one of `scores.GRADIENT_CRITERIA`.
        sparsity: the budget of a task's own mask, of the live weights.
        sites: heads and neurons, if they are wanted.
    """

    def __init__(
        self,
        weights: Tensors,
        criterion: str,
        sparsity: float,
        sites: Sites | None = None,
        *,
        sample: int = SAMPLE,
        seed: int = 0,
    ):
        self.weights, self.criterion, self.sparsity = weights, criterion, sparsity
        self.sites, self.seed = sites or {}, seed
        live = {name: weight.detach().cpu() != 0 for name, weight in weights.items()}
        self.live = None if all(bool(alive.all()) for alive in live.values()) else live
        self.sample = draw_sample(live, sample, seed)
        self.evidence: dict[str, Evidence] = {}

    def watch(self, task_gradients: Gradients) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields (task, its scores), one task at a time, and keeps the evidence."""
        function, reduce = GRADIENT_CRITERIA[self.criterion]
        weights = take(self.weights, self.sample)
        for task, gradients in task_gradients:
            total = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in self.weights.items()}
            summed = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
            batches = []
            for batch in gradients:
                batches.append({name: reduce(g) for name, g in take(batch, self.sample).items()})
                for name, gradient in batch.items():
                    summed[name] += gradient
                    total[name] += reduce(gradient)
                del batch
            gradient = sketch(summed, seed=self.seed)
            del summed
            scores = {name: function(w.detach().float(), total.pop(name)) for name, w in self.weights.items()}
            by_batch = {name: torch.stack([batch[name] for batch in batches]) for name in self.sample}
            self.see(task, scores, Sampled(by_batch, weights, function), gradient)
            yield task, scores

    def see(self, task: str, scores: Tensors, sampled: Sampled, gradient: Tensors) -> None:
        """Takes a task's scores, on whatever device, as evidence."""
        on_cpu = {name: tensor.detach().cpu() for name, tensor in scores.items()}
        self.evidence[task] = Evidence(
            keep=own_mask(on_cpu, self.sparsity, self.live),
            scores=take(on_cpu, self.sample),
            sampled=sampled,
            gradient=gradient,
            parts=part_scores(on_cpu, self.sites),
        )

    def measures(self, draws: int = DRAWS) -> dict[str, Any]:
        """What analysis.json holds of a stage: "agreement", "watershed", "affinity", "keepers" and "parts"."""
        evidence = self.evidence
        counts = tally({task: seen.keep for task, seen in evidence.items()}, self.live)
        if len(evidence) > 1:
            drawn = bootstrap({task: seen.sampled for task, seen in evidence.items()}, self.sparsity, draws, self.seed)
        else:
            drawn = torch.zeros(draws, len(counts.groups), 0, dtype=torch.float64)
        rows, place = with_intervals(counts, drawn)
        return {
            "agreement": rows,
            "watershed": place,
            "affinity": {
                "importance": shared_importance({task: seen.scores for task, seen in evidence.items()}),
                "gradient_cosine": gradient_cosine({task: seen.gradient for task, seen in evidence.items()}),
            },
            "keepers": keepers(counts),
            "parts": parts({task: seen.parts for task, seen in evidence.items()}, self.sparsity),
        }


class Watch:
    """What the tasks agree on while their scores stream by in training, from a sample: a few numbers for a log.

    Args:
        weights: the prunable weights by name; zeros are out.
        sparsity: the budget of a task's own mask, of the live weights.
    """

    def __init__(self, weights: Tensors, sparsity: float, seed: int = 0):
        self.sparsity = sparsity
        self.sample = draw_sample({name: weight.detach().cpu() != 0 for name, weight in weights.items()}, seed=seed)
        self.samples: dict[str, Tensors] = {}

    def watch(self, task_scores: Iterable[tuple[str, dict[str, Tensor]]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Hands (task, scores) on."""
        for task, scores in task_scores:
            self.samples[task] = take(scores, self.sample)
            yield task, scores

    def scalars(self) -> dict[str, float]:
        """`agreement` of all tasks at once beyond chance, over all layers, in the first and in the last, and the `watershed` if any."""
        counts = tally({task: own_mask(scores, self.sparsity) for task, scores in self.samples.items()})
        layers, curve = by_layer(counts)
        if not curve:
            return {}
        found = {"agreement": _everywhere(counts), "agreement_first_layer": curve[0], "agreement_last_layer": curve[-1]}
        place = watershed(curve)
        return found if place is None else {**found, "watershed": layers[place]}


def _everywhere(counts: Tally) -> float:
    """Beyond chance, of all tasks at once over the weights of all layers."""
    whole = [g for g, (_, kind) in enumerate(counts.groups) if kind == WHOLE]
    return float(overlaps(counts.pairs[whole].sum(0), counts.votes[whole].sum(0))[2][-1])

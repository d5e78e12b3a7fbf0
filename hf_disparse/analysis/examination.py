"""All measures of one model, from gradients that stream by task by task.

Each task leaves its own mask (one byte a weight), a sample of its scores and of what each batch adds to them, a sketch of its
gradient, and its scores of heads and neurons. Scoring a task takes two buffers of the weights' size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_disparse.analysis.affinity import gradient_cosine, shared_importance, sketch
from hf_disparse.analysis.agreement import WHOLE, Tally, by_layer, overlaps, tally
from hf_disparse.analysis.bootstrap import DRAWS, SAMPLE, Sampled, bootstrap, draw_sample, take, with_intervals
from hf_disparse.analysis.keepers import keepers, part_scores, parts
from hf_disparse.analysis.own_masks import own_mask
from hf_disparse.analysis.watershed import watershed
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.parts import Sites, Tensors
from hf_disparse.pruning.scores import GRADIENT_CRITERIA, Stream

TaskGradients = Iterable[
    tuple[str, Iterable[Tensors]]
]  # (task, its gradients batch by batch), as `scores.gradients` yields


@dataclass(frozen=True)
class Evidence:
    """What remains of one task.

    Args:
        keep: the mask that the task would have alone.
        scores: parameter name -> (n,), scores of the sampled weights.
        sampled: what each scoring batch adds to the scores of the sampled weights.
        gradient: a sketch of its summed gradients.
        parts: scores of the parts: kind -> site -> (parts,).
    """

    keep: Masks
    scores: Tensors
    sampled: Sampled
    gradient: Tensors
    parts: Mapping[str, Mapping[str, Tensor]]


class Examination:
    """Collects evidence from the tasks of one model as they stream by, then measures.

    Args:
        weights: the prunable weights by name, as they are while the tasks are scored; zeros do not count as live.
        criterion: one of `scores.GRADIENT_CRITERIA`.
        sparsity: the share of live weights that a task's own mask prunes.
        sites: heads and neurons to measure, if any.
        sample: number of weights to sample.
        seed: of the sample, the sketches and the bootstrap.
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

    def watch(self, task_gradients: TaskGradients) -> Stream:
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
        """Turns a task's scores, on any device, into evidence."""
        on_cpu = {name: tensor.detach().cpu() for name, tensor in scores.items()}
        self.evidence[task] = Evidence(
            keep=own_mask(on_cpu, self.sparsity, self.live),
            scores=take(on_cpu, self.sample),
            sampled=sampled,
            gradient=gradient,
            parts=part_scores(on_cpu, self.sites),
        )

    def measures(self, draws: int = DRAWS) -> dict[str, Any]:
        """The entry of a stage in analysis.json: "agreement", "watershed", "affinity", "keepers" and "parts"."""
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
    """Agreement of the tasks during training, from a sample of the scores that stream by: a few numbers for a log.

    Args:
        weights: the prunable weights by name; zeros do not count as live.
        sparsity: the share of live weights that a task's own mask prunes.
    """

    def __init__(self, weights: Tensors, sparsity: float, seed: int = 0):
        self.sparsity = sparsity
        self.sample = draw_sample({name: weight.detach().cpu() != 0 for name, weight in weights.items()}, seed=seed)
        self.samples: dict[str, Tensors] = {}

    def watch(self, task_scores: Iterable[tuple[str, dict[str, Tensor]]]) -> Stream:
        """Passes (task, scores) on, after sampling them."""
        for task, scores in task_scores:
            self.samples[task] = take(scores, self.sample)
            yield task, scores

    def scalars(self) -> dict[str, float]:
        """`agreement` of all tasks beyond chance, over all layers, in the first and in the last; and the `watershed`, if any."""
        counts = tally({task: own_mask(scores, self.sparsity) for task, scores in self.samples.items()})
        layers, curve = by_layer(counts)
        if not curve:
            return {}
        found = {"agreement": _everywhere(counts), "agreement_first_layer": curve[0], "agreement_last_layer": curve[-1]}
        place = watershed(curve)
        return found if place is None else {**found, "watershed": layers[place]}


def _everywhere(counts: Tally) -> float:
    """Agreement of all tasks beyond chance, over the weights of all layers."""
    whole = [g for g, (_, kind) in enumerate(counts.groups) if kind == WHOLE]
    return float(overlaps(counts.pairs[whole].sum(0), counts.votes[whole].sum(0))[2][-1])

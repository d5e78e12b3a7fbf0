"""What each task needs, where tasks diverge, and what sparsity costs, measured on masks, scores and gradients.

`hf-disparse analyze` runs all of it on a model or a run; docs/analysis.md explains each measure.
"""

from hf_disparse.analysis.affinity import gradient_cosine, shared_importance, sketch
from hf_disparse.analysis.agreement import Tally, agreement, beyond_chance, by_layer, tally
from hf_disparse.analysis.bootstrap import Sampled, bootstrap, draw_sample, take, with_intervals
from hf_disparse.analysis.cost_curve import cost_curve, knee, masks_at
from hf_disparse.analysis.examination import Examination, Watch
from hf_disparse.analysis.footprint import footprint
from hf_disparse.analysis.keepers import keepers, part_scores, parts
from hf_disparse.analysis.own_masks import own_mask
from hf_disparse.analysis.watershed import watershed, watershed_interval

__all__ = [
    "Examination",
    "Sampled",
    "Tally",
    "Watch",
    "agreement",
    "beyond_chance",
    "bootstrap",
    "by_layer",
    "cost_curve",
    "draw_sample",
    "footprint",
    "gradient_cosine",
    "keepers",
    "knee",
    "masks_at",
    "own_mask",
    "part_scores",
    "parts",
    "shared_importance",
    "sketch",
    "take",
    "tally",
    "watershed",
    "watershed_interval",
    "with_intervals",
]

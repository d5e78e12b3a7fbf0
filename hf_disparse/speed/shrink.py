"""`shrink`: a finished model made as fast as asked, in place, without a training step."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_disparse.config import SpeedConfig, UserError
from hf_disparse.export.compact import compact
from hf_disparse.export.measurements import tokens_to_time
from hf_disparse.model.adapters import has_adapters
from hf_disparse.model.architectures import layout_of
from hf_disparse.model.prunable import prunable_parameters, prunable_sites
from hf_disparse.model.unshared import PRIVATE
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.masks import apply_masks
from hf_disparse.pruning.reconstruction import reconstruct
from hf_disparse.pruning.scores import Batch, LossFunction, model_loss
from hf_disparse.pruning.sped_up import refuse_sped_up
from hf_disparse.speed.choice import Choice, JudgedSite, best_choices
from hf_disparse.speed.latency import KINDS, LatencyTable, Timer, measure_table
from hf_disparse.speed.statistics import gather, of_magnitude

_LENGTH = 128  # tokens, if the config does not say
_TRIES, _CLOSE = 4, 0.03  # how often the budget is corrected by a measurement, and how far below it is good enough


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did: milliseconds of a pass, measured unless said otherwise, and what stays of every site.

    Args:
        before, wanted, predicted, after: milliseconds; `predicted` is the sum of the table, of what was measured as `after`.
        parts: kind -> layer by layer, how many stay.
        zeros: kind -> layer by layer, the fraction of zeros among the weights that stay.
        table: what heads, neurons and zeros cost in time, measured.
    """

    runtime: str
    batch: int
    length: int
    threads: int
    before: float
    wanted: float
    predicted: float
    after: float
    parts: dict[str, list[int]]
    zeros: dict[str, list[float]]
    table: LatencyTable

    @property
    def speedup(self) -> float:
        """How many times as fast as before."""
        return self.before / self.after

    def sentence(self) -> str:
        """Says what was gained, and how near the table came."""
        heads, neurons = (", ".join(map(str, self.parts[kind])) for kind in KINDS)
        return (
            f"{self.speedup:.2f} times as fast: {self.before:.1f} to {self.after:.1f} ms for {self.batch} texts of {self.length} "
            f"tokens (by the table {self.predicted:.1f}); heads {heads}; neurons {neurons}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields but the table, and the speed-up, as plain JSON types."""
        return {key: value for key, value in asdict(self).items() if key != "table"} | {"speedup": self.speedup}


def shrink(
    model: PreTrainedModel,
    batches: Mapping[str, Iterable[Batch]],
    config: SpeedConfig,
    *,
    loss_fn: LossFunction = model_loss,
    progress: bool = False,
) -> Shrunk:
    """Removes the heads, neurons and weights that cost the tasks least for the time they take, until the model is fast enough.

    The rest is refitted by least squares, and the model is compact afterwards: `save_pretrained` and `from_pretrained` work as
    usual. It takes a minute or two for a small encoder. Training the model afterwards wins back most of what was lost; hold
    its zeros by `masks=find_masks(...)`.

    Args:
        model: a MultitaskModel or a transformers model with a head, on the CPU in float32.
        batches: task -> a few hundred labelled examples in batches; one key for a model with one task.
        config: how fast, where, and who decides.
        loss_fn: (model, batch) -> loss, the mean over the batch's examples.

    Raises:
        UserError: the speed cannot be had, or the encoder's layers are not known.
    """
    encoder = _checked(model)
    batches = {task: list(of_task) for task, of_task in batches.items()}
    if not batches or not all(batches.values()):
        task = next((f"task '{task}'" for task, of_task in batches.items() if not of_task), "any task")
        raise UserError(f"shrink: expected batches of every task to judge by, got none of {task}")
    length = tokens_to_time(encoder.config, config.length or _LENGTH)
    with _threads(config.threads):
        timer = Timer(encoder, config.runtime, config.batch, length)
        before, table = timer.before(), measure_table(timer, progress)
        wanted = before / config.speedup if config.speedup else config.latency_ms / 1000
        if table.least > wanted:  # known before minutes of judging
            raise _too_fast(table.least, wanted)
        sites = _judge(model, batches, config, table.zeros, loss_fn, progress)
        choices, masks, after = _choose(model, sites, timer, table, before, wanted, config.decision == "unanimous")
    parameters = prunable_parameters(model)
    whole = {name: p.detach().clone() for name, p in parameters.items()}
    apply_masks(model, masks)
    rows = [batch for of_task in batches.values() for batch in of_task]
    try:
        reconstruct(model, masks, whole, rows, loss_fn=loss_fn, progress=progress)
    except UserError:  # as of layers with a convolution between them
        for name, weight in whole.items():
            parameters[name].data.copy_(weight)
        raise
    compact(model)
    return Shrunk(
        runtime=config.runtime,
        batch=config.batch,
        length=length,
        threads=config.threads,
        before=1000 * before,
        wanted=1000 * wanted,
        predicted=1000
        * (table.least + sum(table.at(sites[name].kind, c.parts, c.zeros) for name, c in choices.items())),
        after=1000 * after,
        parts={kind: [site.parts for site in prunable_sites(model, config)[kind].values()] for kind in KINDS},
        zeros={kind: [c.zeros for name, c in choices.items() if sites[name].kind == kind] for kind in KINDS},
        table=table,
    )


def _checked(model: PreTrainedModel) -> nn.Module:
    """The model's encoder, if it can be shrunk."""
    refuse_sped_up(model, "shrink")
    if has_adapters(model):
        raise UserError("shrink: a model with PEFT adapters cannot be shrunk; shrink it before adding them")
    encoder = model.base_model
    if hasattr(encoder, PRIVATE):
        raise UserError(
            "shrink: an encoder whose tasks have private layers cannot be shrunk; shrink it before unsharing"
        )
    if skipped := getattr(model.config, "skipped_layers", None):
        raise UserError(
            f"shrink: the model skips layers {skipped}; remove them first by hf_disparse.export.compact(model)"
        )
    layers = encoder.get_submodule(layout_of(encoder, "shrink").layers)
    uses = [id(p) for layer in layers for _, p in layer.named_parameters(remove_duplicate=False)]
    if len(set(uses)) < len(uses):
        raise UserError(
            "shrink: the encoder's layers share weights, so they cannot be shrunk each on its own; copy them"
        )
    if {p.device.type for p in encoder.parameters()} != {"cpu"} or encoder.dtype != torch.float32:
        raise UserError(
            f"shrink: expected a model on the CPU in float32, got {encoder.dtype} on {encoder.device}; try model.float().cpu()"
        )
    return encoder


def _judge(
    model: PreTrainedModel,
    batches: Mapping[str, list[Batch]],
    config: SpeedConfig,
    zeros: Iterable[float],
    loss_fn: LossFunction,
    progress: bool,
) -> dict[str, JudgedSite]:
    """Site -> what its parts and weights cost the tasks, in the order of the layers."""
    weights = {name: p.detach() for name, p in prunable_parameters(model).items()}
    places = {name: (kind, site) for kind in KINDS for name, site in prunable_sites(model, config)[kind].items()}
    readers = [module for _, site in places.values() for module, (dim, _) in site.members.items() if dim == 1]
    if config.criterion == "curvature":
        found = gather(model, [n.removesuffix(".weight") for n in weights], readers, batches, loss_fn, progress)
        found = (found.joint() if config.decision == "joint" else found).in_units(weights)
    else:
        if config.criterion == "random":
            generator = torch.Generator().manual_seed(config.seed)
            weights = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        found = of_magnitude(weights, readers)
    bar = tqdm(places.items(), desc="judging heads and neurons", disable=not progress, leave=False)
    return {name: JudgedSite(kind, site, weights, found, zeros) for name, (kind, site) in bar}


def _choose(
    model: PreTrainedModel,
    sites: Mapping[str, JudgedSite],
    timer: Timer,
    table: LatencyTable,
    before: float,
    wanted: float,
    by_worst: bool,
) -> tuple[dict[str, Choice], Masks, float]:
    """Returns what stays, as masks too, and the seconds that this takes, at most `wanted`.

    The table's sums are off by a few percent, so the budget is corrected by what a compact copy really takes.
    """
    ones = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable_parameters(model).items()}
    options = {name: site.options(table) for name, site in sites.items()}
    least = table.least + sum(costs.seconds.min() for _, costs in options.values())
    if least > wanted:
        raise _too_fast(least, wanted)
    budget, best = wanted, None
    for _ in range(_TRIES):
        choices = best_choices(options, budget - table.least, by_worst)
        masks = dict(ones)
        for name, choice in choices.items():
            masks |= sites[name].masks(choice, masks)
        trial = copy.deepcopy(model)
        apply_masks(trial, masks)
        compact(trial)
        after = before * timer.after(trial.base_model)
        if after <= wanted and (best is None or after > best[2]):
            best = choices, masks, after
        if (1 - _CLOSE) * wanted <= after <= wanted:
            break
        budget = max(budget * (1 - _CLOSE / 3) * wanted / after, least * (1 + 1e-9))
    if best is None:
        raise _too_fast(after, wanted)
    return best


def _too_fast(possible: float, wanted: float) -> UserError:
    return UserError(
        f"speedup: expected at least {1000 * possible:.3g} ms a pass on this machine, got {1000 * wanted:.3g} ms; ask for "
        "less speed, or drop layers first"
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

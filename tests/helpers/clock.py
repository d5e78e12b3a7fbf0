"""A clock by which an encoder's shape decides how long it takes, so that no test depends on the machine."""

import importlib

import torch

from hf_disparse import SpeedConfig
from hf_disparse.model.architectures import find_sites
from hf_disparse.speed.latency import Timer

LATENCY = importlib.import_module("hf_disparse.speed.latency")
SHRINK = importlib.import_module("hf_disparse.speed.shrink")  # `hf_disparse.speed.shrink` may also be the function
WEIGHTS = {"head": 1.0, "neuron": 1 / 8}
LABELS = {"two": [0, 1, 1, 0], "three": [0, 2, 1, 1], "real": [0.1, 0.7, -0.4, 0.2]}


def seconds_of(encoder, zeros_help: bool = False) -> float:
    """One second, one more for each head and for each eight neurons; where zeros help, as little as half of that."""
    total = 1.0
    for kind, weight in WEIGHTS.items():
        for site in find_sites(encoder)[kind].values():
            matrices = [encoder.get_submodule(module).weight for module in site.members]
            density = sum(int((m != 0).sum()) for m in matrices) / sum(m.numel() for m in matrices)
            total += weight * site.parts * (0.5 + 0.5 * density if zeros_help else 1.0)
    return total


def set_clock(monkeypatch, seconds=seconds_of) -> None:
    """Makes `shrink` measure by `seconds`, a function of the encoder; in the runtime `fast`, zeros help."""

    def least(timer, *encoders):
        return [seconds(e, True) if timer.runtime == "fast" and seconds is seconds_of else seconds(e) for e in encoders]

    monkeypatch.setattr(Timer, "_least", least)
    for name in ("fuse", "speed_up"):  # matrices stay as they are, so that their zeros can be counted
        monkeypatch.setattr(LATENCY, name, lambda encoder: encoder)


def labelled(task: str, seed: int) -> dict:
    """Four texts of unequal lengths."""
    generator, mask = torch.Generator().manual_seed(seed), torch.ones(4, 6 + seed, dtype=torch.long)
    mask[1, 3:] = mask[2, 5:] = 0
    ids = torch.randint(4, 44, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(LABELS[task]), "task": task}


def some_batches(*tasks: str) -> dict[str, list[dict]]:
    return {task: [labelled(task, seed) for seed in range(2)] for task in tasks or LABELS}


def speed(**changes) -> SpeedConfig:
    return SpeedConfig(**{"runtime": "torch", "batch": 2, "length": 8} | ({"speedup": 1.5} | changes))


def parts_of(model) -> dict[str, list[int]]:
    sites = find_sites(model.base_model)
    return {kind: [site.parts for site in sites[kind].values()] for kind in ("head", "neuron")}

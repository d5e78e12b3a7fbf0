"""Bytes, time and memory of packed checkpoints relative to dense ones of the same weights, measured in one run.

    python tests/benchmarks/packed.py           # about 3 minutes on 2 cores

Encoders with the shapes of BERT-base and MiniLM-L6 and random weights, 90 % of the prunable ones zero. Loading a dense
checkpoint only maps the file; the system reads and copies a page when it is first written. So "ready to train" also writes
every weight once, as the first training step does.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import side_by_side, timed
from transformers import AutoModel, BertConfig, logging

import hf_disparse  # noqa: F401, registers the reader of packed checkpoints
from hf_disparse import prunable_parameters
from hf_disparse.export import save_packed

SHAPES = {
    "BERT-base": dict(),
    "MiniLM-L6": dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
}
ROUNDS = 9


def sparse_encoder(**shape):
    torch.manual_seed(0)
    model = AutoModel.from_config(BertConfig(**shape))
    for weight in prunable_parameters(model).values():
        weight.data.mul_(torch.rand_like(weight) >= 0.9)
    return model


def load_to_train(folder: Path):
    model = AutoModel.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.0)
    return model


def ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Time of the second relative to the first."""
    return side_by_side({"first": timed(first), "second": timed(second)}, ROUNDS)["second"]


def peak(action: str, folder: Path) -> int:
    """Peak resident bytes of a new process that loads `folder` and, if `action` is "save", saves it packed."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import packed\n"
        f"model = packed.load_to_train(Path({str(folder)!r}))\n"
        + (f"packed.save_packed(model, {str(folder) + '-again'!r})\n" if action == "save" else "")
        # not getrusage, whose maximum a new process inherits
        + "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024


def measure(name: str, folder: Path) -> None:
    model = sparse_encoder(**SHAPES[name])
    dense, packed, numbers = folder / "dense", folder / "packed", iter(range(10**6))
    model.save_pretrained(dense)
    sizes = save_packed(model, packed)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"  bytes of the packed matrices over dense: {sizes['packed_bytes'] / sizes['packed_dense_bytes']:.4f}")
    print(f"  bytes of the whole file over dense:      {sizes['bytes'] / sizes['dense_bytes']:.4f}")
    half = save_packed(model, folder / "half", dtype=torch.bfloat16)
    print(f"  bytes of the matrices in 16 bits:        {half['packed_bytes'] / half['packed_dense_bytes']:.4f}")
    load = AutoModel.from_pretrained
    print(f"  load packed over map dense:              {ratio(lambda: load(dense), lambda: load(packed)):.2f}")
    ready = ratio(lambda: load_to_train(dense), lambda: load_to_train(packed))
    print(f"  ready to train, packed over dense:       {ready:.2f}")

    def save_dense() -> None:
        model.save_pretrained(folder / f"dense-{next(numbers)}")

    def save_small() -> None:
        save_packed(model, folder / f"packed-{next(numbers)}")

    print(f"  save packed over save dense:             {ratio(save_dense, save_small):.2f}")
    largest = max(p.nbytes for p in model.parameters())
    more = (peak("load", packed) - peak("load", dense)) / largest
    print(f"  peak memory, load packed less load dense, in largest matrices: {more:.2f}")
    more = (peak("save", packed) - peak("load", packed)) / largest
    print(f"  peak memory, save packed more than the model, in largest matrices: {more:.2f}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as temporary:
            measure(shape, Path(temporary))

"""Speed of onnxruntime relative to torch, for a dense and a compact model, measured in one run.

    python tests/benchmarks/onnx_speed.py       # about 3 minutes on 2 cores

MiniLM-L6 (22M parameters) in float32 with one task, whole and without half of its attention heads and neurons. Needs the extra
`onnx`.
"""

import functools
import tempfile
import warnings
from pathlib import Path

import onnxruntime
import torch
from compact import ENCODER, halve
from timing import inference, side_by_side
from transformers import logging

from hf_disparse import MultitaskModel, TaskConfig, save_onnx
from hf_disparse.files import resolve

ROUNDS = 25
TASK = TaskConfig(name="task", columns="text", labels=["no", "yes"])

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    blocks = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("dense", "compact"):
            model = MultitaskModel.from_encoder(resolve(ENCODER), [TASK]).eval()
            if name == "compact":
                halve(model)
            save_onnx(model, Path(temporary, name))
            session = onnxruntime.InferenceSession(Path(temporary, name, "model.onnx"))
            blocks[f"torch {name}"] = lambda batch, model=model: model(**batch)
            blocks[f"onnx {name}"] = lambda batch, session=session: session.run(
                None, {key: value.numpy() for key, value in batch.items()}
            )
    print("times faster than torch dense")
    print("batch  tokens  " + "  ".join(f"{name:>13}" for name in list(blocks)[1:]))
    for size in (1, 32):
        for tokens in (32, 128):
            batch = {"input_ids": torch.randint(1000, 20000, (size, tokens))}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            ready = {name: inference(functools.partial(block, batch)) for name, block in blocks.items()}
            times = side_by_side(ready, ROUNDS)
            cells = [f"{1 / times[name]:13.2f}" for name in list(blocks)[1:]]
            print(f"{size:5}  {tokens:6}  " + "  ".join(cells), flush=True)

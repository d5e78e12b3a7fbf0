"""One shared encoder and one head per task, as a transformers model.

A head is the architecture's classification model without its encoder, but with its pooler: its forward, loss and parameter
names are transformers' own, for every architecture and without a copy of their code.
"""

import copy
from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hf_disparse.config import TaskConfig, UserError, require
from hf_disparse.model.adapters import OF_THE_HUB, TaskAdapters, without_adapters
from hf_disparse.model.architectures import encoder_layers
from hf_disparse.model.structure import rebuild
from hf_disparse.model.unshared import PRIVATE, UnsharedLayers

HUB_ARGUMENTS = (*OF_THE_HUB, "subfolder")


class MultitaskConfig(PreTrainedConfig):
    """Configuration of a `MultitaskModel`.

    Args:
        encoder_config: configuration of an encoder whose classification heads work on its last hidden state alone, as
            `MultitaskModel.from_encoder` checks.
        tasks: one `TaskConfig`, or its dictionary, per head. A list, because parameters come in its order.
        skipped_layers: indices of encoder layers that pass their input on, see `MultitaskModel.skip_layers`.
        adapters: the tasks with an adapter, see `MultitaskModel.add_adapter`.
        unshared: task -> index of its first encoder layer of its own, see `unshare`.
    """

    model_type = "hf_disparse_multitask"
    # Otherwise an evaluation would gather them for all examples if the encoder is configured to return them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions"]

    encoder_config: dict | PreTrainedConfig | None = None
    tasks: list = field(default_factory=list)
    skipped_layers: list = field(default_factory=list)
    adapters: list = field(default_factory=list)
    unshared: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        given = self.encoder_config
        is_mapping = isinstance(given, dict) and "model_type" in given
        if not is_mapping and not isinstance(given, (PreTrainedConfig, type(None))):
            raise UserError(f"encoder_config: expected a mapping with a model_type, got {str(given)[:100]}")
        for key in ("tasks", "skipped_layers"):
            require(isinstance(getattr(self, key), (list, tuple)), key, "a list", getattr(self, key))
        if isinstance(given, dict):
            self.encoder_config = AutoConfig.for_model(**given)
        self.tasks = [t.to_dict() if isinstance(t, TaskConfig) else t for t in self.tasks]
        super().__post_init__(**kwargs)

    @property
    def task_configs(self) -> dict[str, TaskConfig]:
        """task -> TaskConfig, in the order of the heads."""
        configs = [TaskConfig.from_dict(task, where="tasks") for task in self.tasks]
        names = [config.name for config in configs]
        if len(set(names)) < len(names):
            raise UserError(f"tasks: expected different names, got {names}")
        return {config.name: config for config in configs}


# Assigned here because some releases of transformers alter a `sub_configs` that is set in the class body.
MultitaskConfig.sub_configs = {"encoder_config": AutoConfig}


class HiddenStates(nn.Module):
    """Takes the place of a head's encoder: returns the shared encoder's output, pooled by the head's own pooler."""

    def __init__(self, pooler: nn.Module | None):
        super().__init__()
        self.pooler = pooler

    def get_input_embeddings(self) -> None:
        """Returns None; gradient checkpointing calls it."""

    def forward(self, input_ids=None, inputs_embeds: Tensor | None = None, **_) -> BaseModelOutputWithPooling:
        """`inputs_embeds` is the shared encoder's last hidden state, (batch, tokens, width)."""
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


class MultitaskModel(TaskAdapters, UnsharedLayers, PreTrainedModel):
    """A shared encoder (`self.encoder`), one head per task (`self.heads[task]`), and PEFT adapters of single tasks, if any."""

    config_class = MultitaskConfig
    base_model_prefix = "encoder"
    accepts_loss_kwargs = False  # the loss is a mean over the batch: the Trainer divides it when it accumulates
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MultitaskConfig):
        super().__init__(config)
        if config.encoder_config is None or not config.tasks:
            raise UserError(
                "MultitaskConfig: encoder_config and tasks are required, as in the folders that `train` writes; is this another "
                "kind of model?"
            )
        self.encoder = AutoModel.from_config(config.encoder_config)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # the heads have their own
        self.heads = nn.ModuleDict()
        for name, task in config.task_configs.items():
            if name in dir(self.heads):
                raise UserError(
                    f"tasks: '{name}' cannot name a task, because torch's ModuleDict has an attribute of that name"
                )
            self.heads[name] = _build_head(config.encoder_config, task)
        self._skips: list[RemovableHandle] = []
        self.make_private()
        self.post_init()
        self.skip_layers(config.skipped_layers)

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """task -> TaskConfig, in the order of the heads."""
        return self.config.task_configs

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: encoder and heads are PreTrainedModels that initialise themselves."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Runs the encoder and the head of `task`, which may be omitted if there is only one head.

        Shapes: input_ids, attention_mask, token_type_ids (batch, tokens); labels (batch,) class ids or float targets,
        (batch, classes) float for multi-label, (batch, tokens) for token classification, -100 for tokens without a label.

        Returns:
            The output of the architecture's classification model: `loss` if there are labels, and `logits`, (batch,
            classes) or (batch, tokens, classes).
        """
        inputs = dict(token_type_ids=token_type_ids, position_ids=position_ids, **kwargs)
        inputs |= dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        return self.run_heads([task], labels=labels, **inputs)[0]

    def run_heads(self, tasks: Sequence[str | None], labels: Tensor | None = None, **inputs: Any) -> list[ModelOutput]:
        """Runs several heads on one pass of the encoder, plus one for each task with an adapter or layers of its own.

        Takes the arguments of `forward` and returns one output per task.
        """
        names = [self._task(task) for task in tasks]
        inputs = {name: value for name, value in inputs.items() if value is not None}
        mask, passes, outputs = inputs.get("attention_mask"), {}, []
        for name in names:
            own = name if name in self.adapters or name in self.config.unshared else None
            if own not in passes:
                if self.adapters:
                    self._use_adapter(own)
                with self.layers_of(own):
                    passes[own] = self.encoder(**inputs)
            hidden = passes[own]
            output = self.heads[name](inputs_embeds=hidden[0], attention_mask=mask, labels=labels, return_dict=True)
            for key in ("hidden_states", "attentions"):
                if getattr(hidden, key, None) is not None:
                    output[key] = getattr(hidden, key)
            outputs.append(output)
        return outputs

    def _task(self, task: str | None) -> str:
        if task is None and len(self.heads) == 1:
            return next(iter(self.heads))
        if task not in self.heads:
            raise ValueError(f"task: expected one of {', '.join(self.heads)}, got {task!r}")
        return task

    def skip_layers(self, places: Sequence[int]) -> None:
        """Makes exactly these layers of the encoder pass their input on, as pruned layers do; recorded in the configuration.

        A layer with zero weights does not do so by itself, because its norms and biases still act.
        """
        for handle in self._skips:
            handle.remove()
        layers = encoder_layers(self.encoder, "skipped_layers") if places else []
        if any(type(i) is not int or not 0 <= i < len(layers) for i in places):
            raise UserError(f"skipped_layers: expected indices of {len(layers)} layers, got {list(places)}")
        skipped = [layers[i] for i in places]
        for task, first in self.config.unshared.items() if places else ():
            skipped += [self.encoder.private[task][i - first] for i in places if i >= first]
        self._skips = [layer.register_forward_hook(_hand_on, prepend=True, with_kwargs=True) for layer in skipped]
        self.config.skipped_layers = list(places)

    def add_task(self, task: TaskConfig) -> None:
        """Adds a freshly initialised head for one more task; encoder and other heads do not change."""
        if task.name in self.heads or task.name in dir(self.heads):
            taken = ", ".join(self.heads)
            raise UserError(f"tasks: the name '{task.name}' is taken or reserved; the model has {taken}")
        head = _build_head(self.config.encoder_config, task)
        head.init_weights()
        self.heads[task.name] = head.to(self.device, self.dtype).train(self.training)
        self.config.tasks = [*self.config.tasks, task.to_dict()]

    def remove_task(self, name: str) -> None:
        """Removes a task's head, adapter and own layers; what the other tasks use does not change."""
        if name not in self.heads or len(self.heads) == 1:
            raise UserError(
                f"tasks: expected one of several tasks, got {name!r}; the model has {', '.join(self.heads)}"
            )
        if name in self.adapters:
            self.delete_adapter(name)
        if name in self.config.unshared:
            self.share_again(name)
        del self.heads[name]
        self.config.tasks = [task.to_dict() for task in self.tasks.values() if task.name != name]
        self.settle()

    @classmethod
    def from_encoder(cls, name_or_path: str, tasks: Sequence[TaskConfig], **kwargs: Any) -> "MultitaskModel":
        """Starts from a pretrained encoder: any checkpoint that transformers' classification models load, or a MultitaskModel.

        Every head starts from the pretrained pooler or transform, as in `AutoModelForSequenceClassification`, with a fresh
        classifier. From a MultitaskModel, only the shared encoder is taken. `kwargs` go to `from_pretrained`.

        Raises:
            UserError: the architecture's heads need more than the encoder's last hidden state, or the checkpoint lacks weights.
        """
        encoder_config, rest = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if isinstance(encoder_config, MultitaskConfig):
            source = cls.from_pretrained(name_or_path, **kwargs)
            skipped = source.config.skipped_layers
            config = MultitaskConfig(
                encoder_config=source.config.encoder_config, tasks=list(tasks), skipped_layers=skipped
            )
            model = cls(config)
            model._shape_as(source)
            encoder = {n: t for n, t in source.encoder.state_dict().items() if not n.startswith(f"{PRIVATE}.")}
            model.encoder.load_state_dict(without_adapters(source.encoder, encoder))
            return model.to(source.dtype)
        stored = encoder_config.__dict__.pop("quantization_config", None)  # describes the file, not the model
        encoder_config.name_or_path = ""  # a local path must not be published with the model
        attention = {name: kwargs[name] for name in ("attn_implementation",) if name in kwargs}
        model = cls(MultitaskConfig(encoder_config=encoder_config, tasks=list(tasks), **attention))
        for auto in {auto_class(task): None for task in tasks}:
            mine = [task for task in tasks if auto_class(task) is auto]
            config = head_config(encoder_config, mine[0])
            if stored is not None:
                config.quantization_config = stored
            full, report = auto.from_pretrained(
                name_or_path,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a fine-tuned checkpoint's classifier, which is not used
                **{**hub, **rest},
            )
            model._shape_as(full)
            odd = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
            model.to(full.dtype)._take(full, odd | set(report["missing_keys"]), [task.name for task in mine])
        return model

    def _shape_as(self, source: PreTrainedModel) -> None:
        """Gives the encoder, freshly made from its configuration, the shape of a compact `source`."""
        form = getattr(source.config, "quantization_config", None)
        if getattr(form, "structure", None) and not hasattr(self.config, "quantization_config"):
            rebuild(self.encoder, form.structure)
            self.config.quantization_config = form

    def _take(self, full: PreTrainedModel, fresh: set[str], tasks: list[str]) -> None:
        """Copies encoder and heads of `full`, except `fresh` weights and classifiers, and checks that the logits agree."""
        prefix = full.base_model_prefix + "."
        known = {name: tensor for name, tensor in full.state_dict().items() if name not in fresh}
        encoder = {name.removeprefix(prefix): tensor for name, tensor in known.items() if name.startswith(prefix)}
        lost = next((name for name in self.encoder.state_dict() if name not in encoder), None)
        if lost is not None:  # transformers has initialised it at random
            raise UserError(
                f"model.encoder: the checkpoint lacks the weight {lost}, or has it in another shape than config.json"
            )
        self.encoder.load_state_dict({name: encoder[name] for name in self.encoder.state_dict()})
        for head in (self.heads[task] for task in tasks):
            names = [n for n in head.state_dict() if n in known and not n.startswith("classifier.")]
            head.load_state_dict({n: known[n] for n in names}, strict=False)
        full.load_state_dict(self.heads[tasks[0]].state_dict(), strict=False)
        ids = torch.arange(5, 21).reshape(2, 8) % full.config.vocab_size
        batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
        cause = None
        try:
            with torch.no_grad():
                same = torch.allclose(
                    full.eval()(**batch).logits, self.eval()(**batch, task=tasks[0]).logits, atol=1e-4
                )
        except Exception as error:  # an architecture whose head needs more than hidden states may raise anything
            same, cause = False, error
        if not same:
            kind = f"{type(full).__name__} needs more than its encoder's last hidden state"
            raise UserError(
                f"model.encoder: expected an encoder whose heads can share it, got {full.config.model_type}: {kind}"
            ) from cause


def _hand_on(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Forward hook that returns the layer's input in place of its output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


_hand_on.fast_path = "skip"  # a sped-up encoder leaves the layer out, too


def auto_class(task: TaskConfig):
    """The Auto class of transformers for the heads of this task."""
    is_token = task.problem_type == "token_classification"
    return AutoModelForTokenClassification if is_token else AutoModelForSequenceClassification


def head_config(encoder_config: PreTrainedConfig, task: TaskConfig) -> PreTrainedConfig:
    """The configuration of a plain classification model for one task on this encoder."""
    config = copy.deepcopy(encoder_config)
    config.id2label = dict(enumerate(task.labels or ["LABEL_0"]))
    config.label2id = {label: i for i, label in config.id2label.items()}
    if task.problem_type != "token_classification":
        config.problem_type = task.problem_type
    return config


def _build_head(encoder_config: PreTrainedConfig, task: TaskConfig) -> PreTrainedModel:
    """The architecture's classification model, its encoder replaced by `HiddenStates`."""
    try:
        with torch.device("meta"):  # no memory for the encoder inside, which is thrown away
            head = auto_class(task).from_config(head_config(encoder_config, task))
    except ValueError as error:
        raise UserError(f"model: {encoder_config.model_type} has no head for {task.problem_type}: {error}") from None
    setattr(head, head.base_model_prefix, HiddenStates(getattr(head.base_model, "pooler", None)))
    return head if torch.get_default_device().type == "meta" else head.to_empty(device="cpu")


AutoConfig.register(MultitaskConfig.model_type, MultitaskConfig)
AutoModel.register(MultitaskConfig, MultitaskModel)

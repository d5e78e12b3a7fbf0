"""`MultitaskPipeline`: texts in, the answers of all tasks out, from one pass of the encoder."""

from typing import Any

import torch
from transformers import AutoTokenizer, Pipeline
from transformers.tokenization_utils_base import LARGE_INTEGER

from hf_disparse.config import TaskConfig, UserError
from hf_disparse.fast.families import token_limit
from hf_disparse.fast.speed_up import load_fast, speed_up
from hf_disparse.model.multitask import HUB_ARGUMENTS, MultitaskModel


class MultitaskPipeline(Pipeline):
    """A transformers pipeline that answers a text with {task: answer}.

    Call it with a text, a pair of texts as a tuple, or a list of either. `tasks=` chooses tasks; by default all tasks answer
    whose examples have as many texts. An answer is {"label", "score"} for single-label classification, a list of these for
    multi-label tasks (all labels) and for tokens (each with its "word"), and {"score"} for regression.

    Args:
        model: a MultitaskModel.
        tokenizer: its tokenizer.
        fast: runs the model several times as fast if it has many zeros, see `speed_up`; on the CPU unless `device` says otherwise.
        kwargs: passed on to `transformers.Pipeline`, such as `device`.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: MultitaskModel, tokenizer: Any = None, fast: bool = False, **kwargs: Any):
        if not isinstance(model, MultitaskModel):
            raise UserError(
                f"model: expected a MultitaskModel, got a {type(model).__name__}; use transformers.pipeline"
            )
        if tokenizer is None:
            raise UserError("tokenizer: the model's tokenizer is required")
        if fast and kwargs.get("device") is None:  # transformers would take a GPU if there is one
            kwargs["device"] = model.device
        self._tasks = model.tasks  # kept, because the property builds and checks its configs on every access
        super().__init__(model=model.eval(), tokenizer=tokenizer, **kwargs)
        if fast:
            speed_up(self.model)

    @classmethod
    def from_pretrained(cls, name_or_path: str, dtype: Any = "auto", **kwargs: Any) -> "MultitaskPipeline":
        """Loads model and tokenizer from a folder or the Hub; `kwargs` may also hold `revision`, `token` and the like."""
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if kwargs.get("fast") and str(kwargs.get("device")) in ("None", "-1", "cpu"):
            model = load_fast(name_or_path, MultitaskModel, dtype=dtype, **hub)
        else:
            model = MultitaskModel.from_pretrained(name_or_path, dtype=dtype, **hub)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path, **hub), **kwargs)

    def _sanitize_parameters(self, tasks: list[str] | None = None, **tokenizer: Any) -> tuple[dict, dict, dict]:
        known, tasks = self._tasks, [tasks] if isinstance(tasks, str) else tasks
        if tasks is not None and len(tasks) == 0:
            raise UserError(f"tasks: must not be empty; choose from {', '.join(known)}")
        for task in tasks or ():
            if task not in known:
                raise UserError(f"tasks: the model has no task '{task}'; it has {', '.join(known)}")
        return (
            {**({} if tasks is None else {"tasks": tasks}), **tokenizer},
            {},
            {},
        )  # without tasks, the constructor's apply

    def preprocess(self, inputs: str | tuple[str, str], tasks: list[str] | None = None, **tokenizer: Any) -> dict:
        """Turns one text or pair into the encoder's inputs and the tasks that answer it."""
        texts = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        if not 1 <= len(texts) <= 2 or not all(isinstance(text, str) for text in texts):
            raise UserError(f"inputs: expected a text or a pair of texts, got {str(inputs)[:100]!r}")
        fitting = [name for name, task in self._tasks.items() if len(task.columns) == len(texts)]
        asked = fitting if tasks is None else tasks
        if not asked or not set(asked) <= set(fitting):
            wrong = next((task for task in asked if task not in fitting), None)
            got = "a pair of texts" if len(texts) == 2 else "one text"
            raise UserError(f"inputs: {f'task {wrong!r} does not take' if wrong else 'no task takes'} {got}")
        given = {"truncation": True, "max_length": self._most_tokens(), "return_tensors": "pt", **tokenizer}
        return {
            **self.tokenizer(*texts, **given),
            "asked": torch.tensor([[task in asked for task in self._tasks]]),
        }

    def _most_tokens(self) -> int | None:
        """Where to truncate: the encoder's limit, or None if the tokenizer has its own or neither has any."""
        has_own = self.tokenizer.model_max_length < LARGE_INTEGER
        return None if has_own else token_limit(self.model.config.encoder_config)

    def _forward(self, model_inputs: dict) -> dict:
        asked = model_inputs.pop("asked")
        tasks = [name for i, name in enumerate(self._tasks) if asked[:, i].any()]
        outputs = self.model.run_heads(tasks, **model_inputs)
        logits = {f"logits_{task}": output.logits for task, output in zip(tasks, outputs, strict=True)}
        return {**logits, "asked": asked, **{k: model_inputs[k] for k in ("input_ids", "attention_mask")}}

    def postprocess(self, model_outputs: dict) -> dict[str, Any]:
        """Turns logits into answers."""
        asked = model_outputs["asked"][0].tolist()
        answers = {}
        for (name, task), wanted in zip(self._tasks.items(), asked, strict=True):
            if wanted:
                answers[name] = self._answer(task, model_outputs[f"logits_{name}"][0].float(), model_outputs)
        return answers

    def _answer(self, task: TaskConfig, logits: torch.Tensor, outputs: dict) -> Any:
        if task.problem_type == "regression":
            return {"score": logits[0].item()}
        if task.problem_type == "multi_label_classification":
            return _labelled(task, logits.sigmoid().tolist())
        if task.problem_type == "single_label_classification":
            return _best(task, logits)
        ids, shown = outputs["input_ids"][0], outputs["attention_mask"][0].bool()
        words = self.tokenizer.convert_ids_to_tokens(ids[shown].tolist())
        special = self.tokenizer.get_special_tokens_mask(ids[shown].tolist(), already_has_special_tokens=True)
        each = zip(words, logits[shown], special, strict=True)
        return [{"word": word, **_best(task, row)} for word, row, is_special in each if not is_special]


def _best(task: TaskConfig, logits: torch.Tensor) -> dict[str, Any]:
    score, place = logits.softmax(-1).max(-1)
    return {"label": task.labels[place], "score": score.item()}


def _labelled(task: TaskConfig, scores: list[float]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in zip(task.labels, scores, strict=True)]

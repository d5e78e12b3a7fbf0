"""The forward of a sped-up encoder: one call of C for tokens without padding, or transformers' own forward."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_disparse.config import UserError
from hf_disparse.fast import operators, structs
from hf_disparse.fast.compiler import library
from hf_disparse.fast.families import family_of
from hf_disparse.fast.linear import refuse_gradients
from hf_disparse.fast.plan import EncoderPlan, Replaced, Unfit
from hf_disparse.pruning.sped_up import WAY_BACK, is_sped_up

_WHOLE = (np.int32, np.int64)  # the types of ids that torch takes
_TOKENS = 512  # per thread, run through all layers before the next ones, so that what lies between stays in the cache

_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")  # that compute the same


class FastForward:
    """Takes the place of an encoder's `forward`. Hidden states of padding are 0; nothing else differs.

    Calls that ask for more than the last hidden state go to transformers' forward, on the same sparse matrices.
    """

    def __init__(self, encoder: nn.Module, output: type = BaseModelOutputWithPooling):
        self.encoder, self.output = encoder, output
        self._plan: EncoderPlan | None = None
        self.number = operators.enter(self)

    def __reduce__(self) -> tuple:  # pointers are this process's, and this object's, own
        return FastForward, (self.encoder, self.output)

    def __deepcopy__(self, memo: dict) -> "FastForward":
        return FastForward(memo.get(id(self.encoder), self.encoder), self.output)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the encoder's own forward."""
        encoder, compiled = self.encoder, operators.are_recorded()
        if not compiled:
            self._refuse_training()
        if args:
            named = dict(zip(_names(type(encoder)), args, strict=False))
            if twice := named.keys() & kwargs.keys():
                raise TypeError(f"{type(encoder).__name__}.forward() got multiple values for argument '{min(twice)}'")
            kwargs |= named
        given = {name: value for name, value in kwargs.items() if value is not None}
        try:
            if compiled:  # the operator refuses training, when it runs
                hidden = operators.encode(*self._takes(**given), self._source(), self.number)
            else:
                hidden = self._hidden_for_heads(**given)
        except Unfit:
            self._refuse_training()
            return type(encoder).forward(encoder, **kwargs)
        pooler = getattr(encoder, "pooler", False)
        if pooler is False:
            return self.output(last_hidden_state=hidden)
        pooled = None if pooler is None else pooler(hidden)
        return self.output(last_hidden_state=hidden, pooler_output=pooled)

    def _refuse_training(self) -> None:
        if self.encoder.training and is_sped_up(self.encoder):  # it may be undone, and this kept in another's wrapper
            raise UserError(f"a sped-up model cannot be trained: call model.eval(), or, to train it, {WAY_BACK}")

    def _source(self) -> Tensor | None:
        """A parameter of which someone may want the gradient, if there is one."""
        return next((p for p in self.encoder.parameters() if p.requires_grad), None)

    def _takes(
        self, input_ids=None, attention_mask=None, token_type_ids=None, **others: Any
    ) -> tuple[Tensor | None, ...]:
        """Returns ids, mask and types. Raises Unfit if the caller or the configuration asks for more."""
        config = self.encoder.config
        asked = {
            **{key: getattr(config, key, False) for key in ("output_hidden_states", "output_attentions")},
            **others,
        }
        if asked.pop("return_dict", config.return_dict) is False or any(value is not False for value in asked.values()):
            raise Unfit(f"more is asked for: {', '.join(asked)}")
        if getattr(config, "_attn_implementation", None) not in _ATTENTIONS:
            raise Unfit("attention by a function of the user's")
        return input_ids, attention_mask, token_type_ids

    def hidden_or_slow(self, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
        """The last hidden state, by transformers' forward if this one cannot."""
        self._refuse_training()
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return self._hidden_for_heads(**given)
        except Unfit:
            return type(self.encoder).forward(self.encoder, **given)[0]

    def _hidden_for_heads(self, **given: Any) -> Tensor:
        """The same as `hidden`, but heads read the first hidden state, also where it is padding's. Raises Unfit."""
        mask = given.get("attention_mask")
        is_matrix = isinstance(mask, Tensor) and mask.ndim == 2 and mask.device.type == "cpu"
        if is_matrix and mask.numel() and not mask[:, 0].all():
            raise Unfit("a text begins with padding")
        return self.hidden(**given)

    def hidden(self, **given: Any) -> Tensor:
        """The last hidden state, (batch, tokens, features), 0 where the mask is. Raises Unfit if transformers has to do it."""
        ids, mask, types = (_array(tensor) for tensor in self._takes(**given))
        if ids is None or any(a is not None and (a.shape != ids.shape or a.dtype not in _WHOLE) for a in (ids, types)):
            raise Unfit("input_ids are missing, or ids and types are no whole numbers or have different shapes")
        plan = self._plan
        if plan is None:
            if (family := family_of(self.encoder)) is None:
                raise Unfit("a decoder")
            plan = self._plan = EncoderPlan(self.encoder, family)
        try:
            struct = plan.ready()
        except Replaced:  # the next call reads what is there then
            self._plan = None
            raise
        out = self._run(plan, struct, ids, mask, types)
        return refuse_gradients(out, self._source()) if torch.is_grad_enabled() else out

    def _run(
        self,
        plan: EncoderPlan,
        struct: structs.Encoder,
        ids: np.ndarray,
        mask: np.ndarray | None,
        types: np.ndarray | None,
    ) -> Tensor:
        start, place, target = _tokens(mask, ids.shape)
        longest = place.max() + 1 if plan.family.positions is None else np.diff(start).max()
        if longest > plan.positions:
            raise Unfit("longer than the tables of rotary or relative positions")
        rows = _rows(plan, ids, types, target, place)
        output = torch.empty if len(target) == ids.size else torch.zeros
        out = output(*ids.shape, struct.features, dtype=torch.float32, device="cpu")
        threads = torch.get_num_threads()
        for first, last in _groups(start, _TOKENS * threads):
            begin, end = start[first], start[last]
            own = start[first : last + 1] - begin
            batch = structs.Batch(
                texts=last - first,
                tokens=end - begin,
                start=structs.address(own),
                place=structs.address(place[begin:]),
                target=structs.address(target[begin:]),
                out=structs.address(out),
            )
            for i, row in enumerate(rows):
                batch.row[i] = structs.address(row[begin:])
            if library().encode(structs.reference(struct), structs.reference(batch), threads):
                raise MemoryError(f"a batch of {len(ids)} texts and {len(target)} tokens: out of memory")
        return out


def _rows(
    plan: EncoderPlan, ids: np.ndarray, types: np.ndarray | None, target: np.ndarray, place: np.ndarray
) -> list[np.ndarray]:
    """The row of each embedding table that each token takes."""
    words = ids.reshape(-1)[target]
    rows = []
    for name, size in plan.tables:
        if name == "token_type_embeddings":
            row = np.zeros_like(words) if types is None else types.reshape(-1)[target]
        elif name == "position_embeddings" and plan.family.positions == "skip padding":
            padding = plan.encoder.embeddings.padding_idx
            row = padding + (np.cumsum(ids != padding, axis=1) * (ids != padding)).reshape(-1)[target]
        else:
            row = place if name == "position_embeddings" else words
        if len(row) and not 0 <= row.min() <= row.max() < size:
            raise Unfit(f"{name}: an index out of range, for which torch has an error")
        rows.append(np.ascontiguousarray(row, dtype=np.int64))
    return rows


def _groups(start: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Divides texts into runs of about so many tokens: the first text of each, and the one after its last."""
    first = 0
    while first < len(start) - 1:
        last = max(int(np.searchsorted(start, start[first] + tokens, side="right")) - 1, first + 1)
        yield first, last
        first = last


def _names(kind: type) -> list[str]:
    """Names of the arguments of a model's forward."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def _array(tensor: Any) -> np.ndarray | None:
    """A batch's ids or mask, (batch, tokens)."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.ndim != 2:
        raise Unfit("expected a matrix on the CPU")
    try:
        return tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:  # numpy has no such numbers, or torch.func hides them
        raise Unfit(str(error)) from None


def _tokens(mask: np.ndarray | None, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where texts begin (texts + 1,), the tokens' places in their texts, and their places in the batch, both (tokens,)."""
    texts, length = shape
    if 0 in shape:
        raise Unfit("an empty batch")
    if mask is None:
        target = np.arange(texts * length)
        return np.arange(texts + 1) * length, target % length, target
    if mask.shape != shape:
        raise Unfit("the mask has another shape")
    there = mask != 0
    if (
        np.count_nonzero(there[:, 1:] > there[:, :-1]) + np.count_nonzero(there[:, 0]) != texts
        or not there.any(1).all()
    ):
        raise Unfit("a text with padding inside or without tokens")
    target = np.flatnonzero(there)
    return np.concatenate([[0], np.cumsum(there.sum(1))]), target % length, target

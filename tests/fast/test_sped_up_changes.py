"""What changes after `speed_up` is obeyed, or refused in one line; it is never ignored."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer

from hf_disparse import (
    UserError,
    speed_up,
    undo_speed_up,
)
from tests.helpers.compacting import BATCH
from tests.helpers.speeding import (
    is_fused,
    near,
    outputs,
    sparse_model,
)

pytestmark = pytest.mark.usefixtures("gains")


class Halved(BertLayer):
    """A layer with a forward of its own."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 0.5


class Wrapped(nn.Module):
    """A module around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs) * 0.5


def change_hook(model):
    model.encoder.encoder.layer[0].register_forward_hook(lambda _, args, output: output * 1.5)


def change_pre_hook(model):
    model.encoder.encoder.layer[1].output.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, args[1]))


def change_hook_of_linear(model):
    linear = model.encoder.encoder.layer[1].output.dense
    linear.register_forward_hook(lambda _, args, output: output * 3)


def change_hook_of_encoder(model):
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].flip(0)}), with_kwargs=True
    )


def change_output_of_encoder(model):
    def double(_, args, output):
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.encoder.register_forward_hook(double)


def change_norm(model):
    model.encoder.encoder.layer[1].output.LayerNorm.weight.data = torch.full((16,), 0.3)


def change_norm_in_place(model):
    with torch.no_grad():
        model.encoder.encoder.layer[0].attention.output.LayerNorm.bias.add_(1)


def change_bias(model):
    model.encoder.encoder.layer[1].intermediate.dense.bias = nn.Parameter(torch.linspace(-1, 1, 32))


def change_bias_in_place(model):
    model.encoder.encoder.layer[1].intermediate.dense.bias.data.mul_(-3)


def change_embeddings(model):
    model.encoder.embeddings.word_embeddings.weight.data[5:8] = 0.1


def change_table(model):
    model.encoder.set_input_embeddings(copy.deepcopy(model.encoder.get_input_embeddings()))
    model.encoder.get_input_embeddings().weight.data.mul_(0.5)


def change_all_embeddings(model):
    new = copy.deepcopy(model.encoder.embeddings)
    new.LayerNorm.bias.data.add_(1)
    model.encoder.embeddings = new


def change_layer(model):
    new = copy.deepcopy(model.encoder.encoder.layer[0])
    new.output.LayerNorm.bias.data.sub_(1)
    model.encoder.encoder.layer[0] = new


def change_class_of_layer(model):
    new = copy.deepcopy(model.encoder.encoder.layer[1])
    new.__class__ = Halved
    model.encoder.encoder.layer[1] = new


def change_wrapper(model):
    model.encoder.encoder.layer[0] = Wrapped(model.encoder.encoder.layer[0])


def change_hook_of_skipped_layer(model):
    model.skip_layers([1])
    model.encoder.encoder.layer[1].register_forward_hook(lambda _, args, output: output * 1.5)


def change_order(model):
    layers = model.encoder.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def change_number(model):
    del model.encoder.encoder.layer[1]


def change_linear(model):
    torch.manual_seed(3)
    model.encoder.encoder.layer[0].output.dense = nn.Linear(32, 16)


def change_activation(model):
    model.encoder.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def change_forward(model):
    attention = model.encoder.encoder.layer[0].attention
    slow = attention.forward
    attention.forward = lambda *args, **kwargs: (slow(*args, **kwargs)[0] * 2, None)


def change_parametrization(model):
    class Tripled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    nn.utils.parametrize.register_parametrization(model.encoder.encoder.layer[0].output.LayerNorm, "weight", Tripled())


def change_attention(model):
    from transformers import AttentionInterface

    def uniform(module, query, key, value, *args, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("uniform", uniform)
    model.encoder.set_attn_implementation("uniform")


def change_epsilon(model):
    model.encoder.encoder.layer[1].output.LayerNorm.eps = 0.5


def change_scaling(model):
    model.encoder.encoder.layer[0].attention.self.scaling = 60.0


def change_dropout(model):
    model.encoder.encoder.layer[0].output.dropout = nn.ReLU()


def change_dropout_of_embeddings(model):
    model.encoder.embeddings.dropout = nn.ReLU()


def change_positions(model):
    model.encoder.embeddings.position_ids += 3


def change_token_types(model):
    model.encoder.embeddings.token_type_ids.fill_(1)


def change_configuration_that_is_read_again(model):
    """Modules that exist do not look at it."""
    model.encoder.config.hidden_act = "relu"
    model.encoder.config.num_attention_heads = 1
    model.encoder.config.hidden_size = 8
    change_embeddings(model)
    model.encoder.embeddings.LayerNorm.weight = nn.Parameter(torch.linspace(0.5, 2, 16))


def change_repeated_layer(model):
    model.encoder.encoder.layer.append(model.encoder.encoder.layer[0])


CHANGES = {name.removeprefix("change_"): function for name, function in list(globals().items()) if "change_" in name}


@pytest.mark.parametrize("ran", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_obeyed(change, ran):
    model, plain = speed_up(sparse_model()), sparse_model()
    before = outputs(plain)
    if ran:
        near(outputs(model), before)
    CHANGES[change](model)
    CHANGES[change](plain)
    assert (outputs(plain) - before).abs().max() > 1e-3
    near(outputs(model), outputs(plain))
    near(outputs(copy.deepcopy(model)), outputs(plain))


@pytest.mark.parametrize("change", ["hook", "hook_of_linear", "forward", "hook_of_encoder", "output_of_encoder"])
def test_hooks_that_were_there_before_are_obeyed(change):
    model, plain = sparse_model(), sparse_model()
    CHANGES[change](model)
    CHANGES[change](plain)
    near(outputs(speed_up(model)), outputs(plain))
    near(outputs(undo_speed_up(model)), outputs(plain))


def test_hooks_on_all_modules_are_obeyed(pair):
    model, plain = pair
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        near(outputs(model), outputs(plain))
    finally:
        handle.remove()
    assert seen.count("BertSelfAttention") == 18
    assert is_fused(model.encoder)


def changes_of_the_matrix():
    def assign(linear):
        linear.weight = nn.Parameter(torch.ones(16, 16))

    def data(linear):
        linear.weight.data = torch.ones(16, 16)

    def in_place(linear):
        linear.weight.data.fill_(1)

    def without_gradient(linear):
        with torch.no_grad():
            linear.weight.mul_(2)

    def inferring(linear):
        with torch.inference_mode():
            linear.weight.mul_(2)

    def initialise(linear):
        nn.init.ones_(linear.weight)

    def column(linear):
        linear.weight.T[2].zero_()

    def into(linear):
        torch.zeros(16, 16, out=linear.weight)

    def times(linear):
        weight = linear.weight
        weight *= 2

    def item(linear):
        linear.weight[0, 0] = 3

    return [assign, data, in_place, without_gradient, inferring, initialise, column, into, times, item]


@pytest.mark.parametrize("change", changes_of_the_matrix(), ids=lambda change: change.__name__)
def test_a_matrix_cannot_be_changed_without_a_word(pair, change):
    model, plain = pair
    linear = model.encoder.encoder.layer[0].attention.self.query
    with pytest.raises(UserError) as refused:
        change(linear)
    assert "undo_speed_up" in str(refused.value) and len(str(refused.value).splitlines()) == 1
    near(outputs(model), outputs(plain))


def test_what_is_made_of_a_matrix_is_an_ordinary_tensor(pair):
    ours, theirs = (m.encoder.encoder.layer[0].attention.self.query.weight for m in pair)
    assert torch.equal(ours, theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    for made in (ours.clone(), ours * 2, ours @ ours.T, ours.double(), copy.deepcopy(ours.clone())):
        assert type(made) is torch.Tensor
        made.zero_()
    assert (ours == 0).float().mean() > 0.5
    assert torch.equal(torch.nn.functional.linear(torch.eye(16), ours), theirs.T)


def test_dropout_that_is_switched_on(pair):
    """As Monte Carlo dropout does it: the model in evaluation mode, its dropout in training mode."""
    model, _ = pair
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.train()
    assert not torch.equal(outputs(model), outputs(model))
    model.eval()
    assert is_fused(model.encoder)


def test_a_decoder_is_not_what_it_was(pair):
    model, plain = pair
    for one in pair:
        one.encoder.config.is_decoder = True
    given = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}
    with torch.no_grad():
        near(model.encoder(**given)[0], plain.encoder(**given)[0])
        near(copy.deepcopy(model).encoder(**given)[0], plain.encoder(**given)[0])
    assert not is_fused(model.encoder)


def test_a_new_vocabulary_is_fast_and_the_old_one_is_gone(pair):
    model, plain = pair
    old = weakref.ref(model.encoder.get_input_embeddings().weight)
    for one in pair:
        table = nn.Embedding(99, 16)
        table.weight.data = torch.arange(99 * 16).reshape(99, 16).sin()
        one.encoder.set_input_embeddings(table)
    near(outputs(model), outputs(plain))
    assert is_fused(model.encoder)
    near(outputs(model), outputs(plain))
    gc.collect()
    assert old() is None


def test_layers_that_are_taken_out_are_gone(pair):
    model, _ = pair
    outputs(model)
    old = weakref.ref(model.encoder.encoder.layer[1])
    del model.encoder.encoder.layer[1]
    outputs(model)
    gc.collect()
    assert is_fused(model.encoder) and old() is None

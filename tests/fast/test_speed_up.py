"""A sped-up model answers as before, for every architecture and shape of encoder, and goes back bit for bit."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig, BertModel

from hf_disparse import (
    TaskConfig,
    UserError,
    compact,
    factorise,
    speed_up,
    task_model,
    undo_speed_up,
    unshare,
)
from hf_disparse.fast.encoder import FastForward
from hf_disparse.pruning.sped_up import is_sped_up
from tests.helpers.adapters import adapted
from tests.helpers.compacting import BATCH, model_of, prune_parts
from tests.helpers.speeding import (
    MODULE,
    assert_same_bits,
    bits,
    fast_and_slow,
    fast_linears,
    is_fused,
    near,
    outputs,
    sparse,
    sparse_model,
)
from tests.helpers.tiny import CONFIGS

pytestmark = pytest.mark.usefixtures("gains")
ARCHITECTURE = pytest.mark.parametrize("model_type", CONFIGS)
FUSED = [name for name in CONFIGS if name != "deberta-v2"]


def ragged(texts: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of 1 to `tokens` tokens, padded at their ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (texts, 1), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    return {"input_ids": torch.randint(4, 44, (texts, tokens), generator=generator) * mask, "attention_mask": mask}


@ARCHITECTURE
def test_all_heads_answer_as_before(model_type):
    model, before = fast_and_slow(sparse_model(model_type))
    assert fast_linears(model.encoder) and is_fused(model.encoder) == (model_type in FUSED)
    near(outputs(model), before)
    with torch.no_grad():
        together = model.run_heads(list(model.tasks), **BATCH)
    near(torch.cat([output.logits.flatten() for output in together]), before)


@ARCHITECTURE
@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_plain_models_answer_as_before(model_type, auto, monkeypatch):
    torch.manual_seed(0)
    model = auto.from_config(CONFIGS[model_type]()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    sparse(model)
    batches = [ragged(texts, tokens) for texts, tokens in ((1, 1), (3, 9), (7, 40))]
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        alone = model(batches[0]["input_ids"]).logits
        speed_up(model)
        run, calls = FastForward._run, []
        monkeypatch.setattr(FastForward, "_run", lambda *arguments: calls.append(1) or run(*arguments))
        after = [model(**batch).logits for batch in batches]
        near(model(batches[0]["input_ids"]).logits, alone)
    assert len(calls) == (4 if model_type in FUSED else 0)
    for got, expected, batch in zip(after, before, batches, strict=True):
        real = batch["attention_mask"].bool() if expected.ndim == 3 else slice(None)
        near(got[real], expected[real])


@pytest.mark.parametrize("model_type", FUSED)
def test_what_the_fused_path_does_not_take_goes_to_transformers(model_type):
    model = sparse_model(model_type).encoder
    embedded = model.get_input_embeddings()(BATCH["input_ids"]).detach()
    left = {"input_ids": BATCH["input_ids"].flip(1), "attention_mask": BATCH["attention_mask"].flip(1)}
    inside = {"input_ids": BATCH["input_ids"], "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]])}
    asked = [
        left,
        inside,
        {**BATCH, "output_hidden_states": True},
        {"inputs_embeds": embedded, "attention_mask": BATCH["attention_mask"]},
        {**BATCH, "return_dict": False},
        {**BATCH, "input_ids": BATCH["input_ids"].int()},
        {**BATCH, "attention_mask": BATCH["attention_mask"].float()},
        {"input_ids": BATCH["input_ids"].repeat(1, 2)[:, ::2], "attention_mask": BATCH["attention_mask"]},
    ]
    if model_type != "distilbert":
        asked.append({**BATCH, "position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])})
    with torch.no_grad():
        before = [model(**inputs) for inputs in asked]
        speed_up(model)
        after = [model(**inputs) for inputs in asked]
        near(model(*BATCH.values())[0], model(**BATCH)[0])
    for inputs, got, expected in zip(asked, after, before, strict=True):
        real = inputs["attention_mask"].bool()
        near(got[0][real], expected[0][real])
        assert type(got) is type(expected)
    got, expected = after[2], before[2]
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        near(ours, theirs)
    assert is_fused(model)  # transformers' recording hooks, left behind by the call above, change nothing


def test_a_model_around_it_that_records_hidden_states():
    """As transformers' own classification models do that do not hand the wish on."""
    from transformers.utils.output_capturing import _active_collector

    model, plain = speed_up(sparse_model()).encoder, sparse_model().encoder
    model(**BATCH, output_hidden_states=True)  # leaves recording hooks behind
    recorded = {"hidden_states": []}
    for fused, collector in ((True, {}), (False, recorded)):
        token = _active_collector.set(collector)
        try:
            assert is_fused(model) == fused
            with torch.no_grad():
                hidden = model(**BATCH)[0]
        finally:
            _active_collector.reset(token)
        real = BATCH["attention_mask"].bool()
        with torch.no_grad():
            near(hidden[real], plain(**BATCH)[0][real])


def test_recording_hooks_when_transformers_has_no_such_collector(monkeypatch, gains):
    model, plain = speed_up(sparse_model()).encoder, sparse_model().encoder
    model(**BATCH, output_hidden_states=True)
    assert is_fused(model)
    monkeypatch.setattr("hf_disparse.fast.plan._active_collector", None)
    assert not is_fused(model)
    with torch.no_grad():
        near(model(**BATCH)[0], plain(**BATCH)[0])


def test_token_types_count():
    model = sparse_model()
    types = {**BATCH, "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])}
    before = outputs(model, types)
    assert (before - outputs(model)).abs().max() > 1e-3
    speed_up(model)
    near(outputs(model, types), before)


@ARCHITECTURE
@pytest.mark.parametrize("seed", [0, 1])
def test_compact_models(model_type, seed):
    """Heads and neurons that differ by layer; MPNet's relative positions follow the heads."""
    model = model_of(model_type)
    prune_parts(model, seed=seed)
    compact(model)
    model, before = fast_and_slow(sparse(model, 0.5))
    assert is_fused(model.encoder) == (model_type in FUSED)
    near(outputs(model), before)


def test_a_layer_with_all_neurons_pruned():
    """Compacting leaves one of them, and pruning whole matrices leaves rows without a single weight."""
    model = model_of("bert")
    for module in (
        model.encoder.encoder.layer[1].intermediate.dense,
        model.encoder.encoder.layer[0].attention.self.value,
    ):
        module.weight.data.zero_()
    model.encoder.encoder.layer[2].output.dense.weight.data.zero_()
    compact(model)
    model, before = fast_and_slow(model)
    assert is_fused(model.encoder)
    near(outputs(model), before)


@ARCHITECTURE
@pytest.mark.parametrize("first", [True, False])
def test_skipped_layers(model_type, first):
    """Skipped before and after the call."""
    model = sparse_model(model_type)
    whole = outputs(model)
    places = [0, 2] if model_type not in ("modernbert",) else [2]
    model.skip_layers(places)
    before = outputs(model)
    assert (before - whole).abs().max() > 1e-3
    if not first:
        model.skip_layers([])
    speed_up(model)
    model.skip_layers(places)
    assert is_fused(model.encoder) == (model_type in FUSED)
    near(outputs(model), before)
    model.skip_layers([])
    near(outputs(model), whole)


@ARCHITECTURE
@pytest.mark.parametrize("first", [True, False])
def test_layers_of_a_task_s_own(model_type, first):
    """Unshared before and after the call; several tasks in one pass; shared again."""
    model = sparse_model(model_type)
    shared = outputs(model)
    if not first:
        speed_up(model)
    unshare(model, 1, ["three", "real"])
    if first:
        for parameter in model.encoder.private.parameters():
            parameter.data.mul_(1.5)
        before = outputs(model)
        assert (before - shared).abs().max() > 1e-3
        speed_up(model)
    else:
        before = shared
    assert is_fused(model.encoder) == (model_type in FUSED)
    near(outputs(model), before)
    with torch.no_grad():
        near(torch.cat([o.logits.flatten() for o in model.run_heads(list(model.tasks), **BATCH)]), before)
    for task in ("three", "real"):
        model.share_again(task)
    near(outputs(model), shared)
    assert is_fused(model.encoder) == (model_type in FUSED)
    assert_same_bits(bits(undo_speed_up(model)), bits(model))


def test_two_factors_multiply_sparse():
    model = sparse_model()
    factorise(model)
    sparse(model, 0.9)
    model, before = fast_and_slow(model)
    assert fast_linears(model.encoder)
    near(outputs(model), before)


def test_adapters_have_to_be_merged():
    model = adapted("lora")
    with pytest.raises(UserError, match="merge adapters first") as refused:
        speed_up(model)
    assert len(str(refused.value).splitlines()) == 1 and not is_sped_up(model)
    ia3 = adapted("ia3")
    plain, before = fast_and_slow(task_model(ia3, "two"))
    assert is_fused(plain.base_model)
    near(outputs(plain), before)
    model, before = fast_and_slow(sparse_model())
    import peft

    with pytest.raises(UserError, match="add_adapter: the model is sped up; call hf_disparse") as refused:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), "two")
    near(outputs(model), before)


@ARCHITECTURE
def test_undone_bit_for_bit_and_trainable(model_type):
    model = sparse_model(model_type)
    frozen = next(name for name, p in model.encoder.named_parameters() if name.endswith("weight") and p.ndim == 2)
    linear = next(name for name in prunable(model))
    model.get_parameter(linear).requires_grad_(False)
    before, kinds = bits(model), [type(module) for module in model.modules()]
    speed_up(model)
    assert_same_bits(bits(model), before)
    assert undo_speed_up(model) is model and not is_sped_up(model)
    assert_same_bits(bits(model), before)
    assert [type(module) for module in model.modules()] == kinds and "forward" not in model.encoder.__dict__
    assert not model.get_parameter(linear).requires_grad and model.encoder.get_parameter(frozen).shape
    model.train()
    loss = model(**BATCH, task="two", labels=torch.tensor([0, 1])).loss
    loss.backward()
    with_gradient = [name for name in prunable(model) if name != linear]
    assert all(model.get_parameter(name).grad is not None for name in with_gradient)


def prunable(model) -> list[str]:
    from hf_disparse import prunable_parameters

    return list(prunable_parameters(model))


def test_a_second_call_changes_nothing():
    model, before = fast_and_slow(sparse_model())
    modules, forward = list(model.modules()), model.encoder.forward
    assert speed_up(model) is model
    assert list(model.modules()) == modules and model.encoder.forward is forward
    near(outputs(model), before)


def test_heads_come_and_go():
    model, before = fast_and_slow(sparse_model())
    model.add_task(TaskConfig(name="new", columns="text", labels=["x", "y"]))
    with torch.no_grad():
        assert model(**BATCH, task="new").logits.shape == (2, 2)
    model.remove_task("new")
    near(outputs(model), before)
    near(outputs(copy.deepcopy(model)), before)


def test_a_model_that_would_not_gain_stays_as_it_is(monkeypatch):
    model = sparse_model()
    before, answers = bits(model), outputs(model)
    seconds = iter([[1.0, 1.0], [0.5, 1.25]])
    monkeypatch.setattr(MODULE, "_seconds", lambda model: next(seconds))
    with pytest.warns(UserWarning, match="the model stays as it is: it would be 0.80 times as fast") as warned:
        assert speed_up(model) is model
    assert len(warned) == 1 and warned[0].filename == __file__
    assert not is_sped_up(model) and "forward" not in model.encoder.__dict__
    assert_same_bits(bits(model), before)
    assert torch.equal(outputs(model), answers)


def test_without_a_compiler_it_stays_as_it_is(monkeypatch):
    def missing():
        raise UserError("no C compiler was found; install gcc")

    model = sparse_model()
    before = bits(model)
    monkeypatch.setattr(MODULE, "library", missing)
    with pytest.warns(UserWarning, match="stays as it is: no C compiler was found") as warned:
        assert speed_up(model) is model
    assert len(warned) == 1 and warned[0].filename == __file__ and not is_sped_up(model)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_no_zeros_and_nothing_but_zeros(sparsity):
    model, before = fast_and_slow(sparse(model_of("bert"), sparsity))
    near(outputs(model), before)


@pytest.mark.parametrize("function", [speed_up, undo_speed_up])
def test_what_is_no_model_is_refused(function):
    for wrong in (torch.nn.Linear(2, 2), None, "folder", torch.compile(sparse_model(), backend="eager")):
        with pytest.raises(UserError, match=f"{function.__name__}: expected a transformers model") as refused:
            function(wrong)
        assert len(str(refused.value).splitlines()) == 1


def test_models_it_does_not_fit_are_refused_in_one_line(monkeypatch):
    from transformers import T5Config, T5Model, ViTConfig, ViTModel

    monkeypatch.undo()
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vit = ViTModel(ViTConfig(**small, image_size=8, patch_size=4))
    t5 = T5Model(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    half, other = sparse_model().half(), sparse_model().to("meta")
    cases = [(vit, "token ids"), (t5, "token ids"), (half, "float32"), (other, "on a CPU")]
    for model, reason in cases:
        with pytest.raises(UserError, match=reason) as refused:
            speed_up(model)
        assert len(str(refused.value).splitlines()) == 1 and not is_sped_up(model)


@pytest.mark.parametrize("words", [1, 2, 3, 5])
def test_small_vocabularies(words, gains):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = speed_up(BertModel(BertConfig(vocab_size=words, pad_token_id=0, **sizes)))
    assert model(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 16)

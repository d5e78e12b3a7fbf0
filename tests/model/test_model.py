"""The multitask model against plain transformers: same weights, same logits, for every supported architecture."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    SqueezeBertConfig,
)

from hf_disparse import MultitaskConfig, MultitaskModel, PruningConfig, TaskConfig, UserError, prunable_parameters
from hf_disparse.model.multitask import head_config
from tests.helpers.tiny import CONFIGS, three_tasks, tiny_bert_config, tiny_model

TASKS = [
    TaskConfig(name="single", columns="text", labels=["a", "b", "c"]),
    TaskConfig(name="multi", columns="text", labels=["x", "y"], problem_type="multi_label_classification"),
    TaskConfig(name="real", columns="text", problem_type="regression"),
    TaskConfig(name="tokens", columns="words", labels=["O", "B", "I"], problem_type="token_classification"),
]
INPUTS = {
    "input_ids": torch.tensor([[2, 5, 9, 11, 3], [2, 7, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
LABELS = {
    "single": torch.tensor([2, 0]),
    "multi": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    "real": torch.tensor([0.5, -1.0]),
    "tokens": torch.tensor([[-100, 1, 2, 0, -100], [-100, 0, -100, -100, -100]]),
}


def build(model_type: str) -> MultitaskModel:
    torch.manual_seed(0)
    return MultitaskModel(MultitaskConfig(encoder_config=CONFIGS[model_type](), tasks=TASKS))


def plain_model(model: MultitaskModel, task: TaskConfig):
    """The architecture's own classification model with the weights of one task."""
    auto = AutoModelForTokenClassification if task.name == "tokens" else AutoModelForSequenceClassification
    plain = auto.from_config(head_config(model.config.encoder_config, task))
    state = {f"{plain.base_model_prefix}.{n}": t for n, t in model.encoder.state_dict().items()}
    plain.load_state_dict({**state, **model.heads[task.name].state_dict()}, strict=True)
    return plain


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_logits_loss_and_gradients_are_those_of_transformers(model_type, task):
    model = build(model_type).eval()
    plain = plain_model(model, task).eval()
    ours = model(**INPUTS, labels=LABELS[task.name], task=task.name)
    theirs = plain(**INPUTS, labels=LABELS[task.name])
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    prefix = plain.base_model_prefix
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    prunable = prunable_parameters(model)
    assert prunable
    for name, p in prunable.items():
        torch.testing.assert_close(p.grad, gradients[f"{prefix}.{name.removeprefix('encoder.')}"])


@pytest.mark.parametrize("model_type", CONFIGS)
def test_saved_models_load_through_auto_classes_bit_for_bit(model_type, tmp_path):
    model = build(model_type).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MultitaskModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MultitaskConfig)
    assert list(loaded.state_dict()) == list(model.state_dict()), "the order of the parameters changed"
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert list(loaded.tasks.values()) == TASKS
    for task in TASKS:
        # Not bit for bit: mapped memory is aligned otherwise, and kernels round by alignment.
        torch.testing.assert_close(loaded(**INPUTS, task=task.name).logits, model(**INPUTS, task=task.name).logits)


# Linear modules in one layer, and those outside of the layers, which are not prunable by default
LINEARS = {"bert": 6, "roberta": 6, "distilbert": 6, "electra": 6, "mpnet": 6, "deberta-v2": 8, "modernbert": 4}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_prunable_are_the_linears_of_the_layers(model_type):
    model = build(model_type)
    names = list(prunable_parameters(model))
    assert len(names) == 2 * LINEARS[model_type]
    assert all(name.startswith("encoder.") for name in names)
    assert not [name for name in names if "embed" in name or "pooler" in name or "norm" in name.lower()]


def test_a_plain_classification_model_has_the_same_prunable_weights():
    plain = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    ours = [name.removeprefix("encoder.") for name in prunable_parameters(build("bert"))]
    assert [name.removeprefix("bert.") for name in prunable_parameters(plain)] == ours


@pytest.mark.parametrize(
    ("target", "exclude", "count"),
    [
        (["query", "key"], None, 4),
        (r".*layer\.0\..*dense", None, 3),
        (None, ["query"], 10),
        (None, r".*layer\.1.*", 6),
        (["encoder.encoder.layer.1.output.dense"], None, 1),
        (["output.dense"], ["attention.output.dense"], 2),
    ],
)
def test_target_and_exclude_modules_mean_what_peft_means(target, exclude, count):
    from peft.tuners.tuners_utils import check_target_module_exists

    model = build("bert")
    found = prunable_parameters(model, PruningConfig(target_modules=target, exclude_modules=exclude))
    assert len(found) == count
    if target is not None:
        peft = type("Config", (), dict(target_modules=target, exclude_modules=exclude, layers_to_transform=None))()
        expected = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and check_target_module_exists(peft, name)
            if name.startswith("encoder.")
        ]
        assert list(found) == expected


def test_modules_that_match_nothing_are_refused_with_an_example():
    with pytest.raises(UserError, match=r"target_modules=\('nothing',\).*names look like 'encoder\."):
        prunable_parameters(build("bert"), PruningConfig(target_modules=["nothing"]))


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "distilbert", "roberta"])
def test_from_encoder_starts_as_transformers_classification_model_does(model_type, tmp_path):
    """Encoder, and what pretraining left of the head, come from the checkpoint; classifiers are fresh and differ."""
    torch.manual_seed(1)
    pretrained = AutoModelForSequenceClassification.from_config(CONFIGS[model_type]())
    with torch.no_grad():
        for p in pretrained.parameters():
            p.add_(0.25)  # also of biases, so that nothing fresh equals it
    pretrained.save_pretrained(tmp_path)
    model = MultitaskModel.from_encoder(str(tmp_path), TASKS)
    source = pretrained.state_dict()
    prefix = pretrained.base_model_prefix
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, source[f"{prefix}.{name}"]), name
    for task in ("single", "multi", "real"):
        for name, tensor in model.heads[task].state_dict().items():
            same = tensor.shape == source[name].shape and torch.equal(tensor, source[name])
            assert same != name.startswith("classifier."), name
    assert str(tmp_path) not in model.config.to_json_string(), "the path of a local folder would be published"


def test_from_encoder_takes_the_encoder_of_a_multitask_model(tmp_path):
    source = tiny_model(seed=3)
    source.save_pretrained(tmp_path)
    model = MultitaskModel.from_encoder(str(tmp_path), [TASKS[0]])
    assert list(model.tasks) == ["single"]
    for a, b in zip(model.encoder.state_dict().values(), source.encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", [AlbertConfig, SqueezeBertConfig])
def test_an_architecture_whose_heads_cannot_share_an_encoder_is_refused(config, tmp_path):
    small = dict(vocab_size=64, hidden_size=32, embedding_size=32, num_attention_heads=4, num_hidden_layers=2)
    AutoModelForSequenceClassification.from_config(config(**small, intermediate_size=64)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected an encoder whose heads can share it, got (albert|squeezebert)"):
        MultitaskModel.from_encoder(str(tmp_path), TASKS[:1])


def test_from_encoder_hands_on_what_from_pretrained_takes(tmp_path):
    AutoModelForSequenceClassification.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path / "inner")
    model = MultitaskModel.from_encoder(
        str(tmp_path), TASKS[:1], subfolder="inner", hidden_dropout_prob=0.0, attn_implementation="eager"
    )
    assert model.config.encoder_config.hidden_dropout_prob == 0.0
    assert model.encoder.config._attn_implementation == "eager"
    assert {module.p for name, module in model.encoder.named_modules() if name.endswith("output.dropout")} == {0.0}


def test_a_shared_weight_is_prunable_once():
    model = build("bert")
    layers = model.encoder.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    assert len(prunable_parameters(model)) == 11


def test_a_task_is_needed_where_there_are_several():
    model = build("bert")
    with pytest.raises(ValueError, match="expected one of single, multi, real, tokens, got None"):
        model(**INPUTS)
    with pytest.raises(ValueError, match="got 'other'"):
        model(**INPUTS, task="other")
    only = MultitaskModel(MultitaskConfig(encoder_config=CONFIGS["bert"](), tasks=TASKS[:1])).eval()
    assert torch.equal(only(**INPUTS).logits, only(**INPUTS, task="single").logits)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([TASKS[0], TASKS[0]], "expected different names"),
        ([TaskConfig(name="train", columns="text", labels=["a", "b"])], "'train' cannot name a task"),
        ([], "encoder_config and tasks are required"),
    ],
)
def test_tasks_that_do_not_make_a_model_are_refused(tasks, words):
    with pytest.raises(UserError, match=words):
        MultitaskModel(MultitaskConfig(encoder_config=CONFIGS["bert"](), tasks=tasks))


def test_heads_start_different_and_initialised_as_the_architecture_does():
    model = build("bert")
    heads = [model.heads[name].classifier.weight for name in ("single", "tokens")]
    assert not torch.equal(heads[0][:2], heads[1][:2])
    for head in heads:
        assert 0 < head.std() < 5 * CONFIGS["bert"]().initializer_range
    assert (model.heads["single"].classifier.bias == 0).all()


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])  # the second asks every part for its embeddings
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    plain, saving = build(model_type), build(model_type)
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model.train()
        torch.manual_seed(5)
        model(**INPUTS, labels=LABELS["single"], task="single").loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_task_that_is_removed_is_gone_from_model_and_config_and_the_others_stay(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".two." not in name}
    model.remove_task("two")
    assert list(model.heads) == list(model.tasks) == ["three", "real"]
    model.save_pretrained(tmp_path)
    again = MultitaskModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    model.remove_task("three")
    for name in ("two", "real"):  # no longer there, and the last one
        with pytest.raises(UserError, match="expected one of several tasks"):
            model.remove_task(name)


def test_a_regular_expression_that_does_not_end_is_refused():
    """A stranger's pruning_config.json may hold one; in `re` this name takes longer than there is time."""
    with pytest.raises(UserError, match=r"expected a regular expression that ends, got .* not done with 'encoder"):
        prunable_parameters(tiny_model(), PruningConfig(target_modules="(.|.)*z|(..?)*y"))


@pytest.mark.parametrize("key", ["intermediate_size", "num_hidden_layers"])
def test_a_checkpoint_without_weights_that_its_config_speaks_of_is_refused(tmp_path, key):
    """Transformers would draw them at random, and say so in a log at most."""
    config = tiny_bert_config()
    BertModel(config).save_pretrained(tmp_path)
    setattr(config, key, 2 * getattr(config, key))
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"lacks the weight encoder\.layer\.\S+, or has it in another shape than config\.json"
    ):
        MultitaskModel.from_encoder(str(tmp_path), three_tasks())


@pytest.mark.parametrize(
    "values", [{"skipped_layers": 5}, {"tasks": None}, {"encoder_config": []}, {"encoder_config": {}}]
)
def test_a_config_that_is_none_of_ours_is_refused_by_its_key(values):
    good = {"encoder_config": tiny_bert_config().to_dict(), "tasks": [three_tasks()[0].to_dict()]}
    with pytest.raises(UserError, match=f"^{next(iter(values))}: expected a "):
        MultitaskConfig(**good | values)

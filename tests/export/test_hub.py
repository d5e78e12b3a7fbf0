"""Pushes to and loads from a Hub on loopback with the real huggingface_hub client."""

import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file

from hf_disparse import DisparseTrainer, MultitaskModel, PruningConfig, UserError
from hf_disparse.export import push
from tests.helpers.commands import refused
from tests.helpers.compacting import prune_parts
from tests.helpers.hub_server import run_with_hub, serve
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.helpers.training import arguments, plain_model


@pytest.fixture
def hub(monkeypatch):
    with serve() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that this server does not speak
        yield hub, address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    prune_parts(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    PruningConfig(sparsity=0.5, granularity=["head", "neuron"]).save_pretrained(folder)
    return folder


def client(address: str, token: str | None = "good") -> HfApi:
    return HfApi(endpoint=address, token=token or False)


@pytest.mark.slow
def test_what_is_pushed_loads_elsewhere(hub, folder, tmp_path):
    store, address = hub
    push(folder, "me/sparse", with_tasks=True, license="apache-2.0", api=client(address))
    files = store.files("me/sparse")
    assert {name for name, (_, is_lfs) in files.items() if is_lfs} == {
        "model.safetensors",
        *(f"tasks/{task}/model.safetensors" for task in ("two", "three", "real")),
    }
    assert {"README.md", "config.json", "pruning_config.json", "tokenizer.json"} <= set(files)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    card = ModelCard(files["README.md"][0].decode())
    assert card.data.license == "apache-2.0" and 'from_pretrained("me/sparse")' in card.text
    code = (
        "import torch, hf_disparse\n"
        "from transformers import AutoModel, AutoModelForSequenceClassification\n"
        "model = AutoModel.from_pretrained('me/sparse')\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'state.pt')!r})\n"
        "assert hf_disparse.PruningConfig.from_pretrained('me/sparse').sparsity == 0.5\n"
        "answers = hf_disparse.MultitaskPipeline.from_pretrained('me/sparse')('w1 w2')\n"
        "assert set(answers) == {'two', 'three', 'real'}, answers\n"
        "from hf_disparse.model.loading import model_folder\n"
        "assert not (model_folder('me/sparse') / 'tasks').exists(), 'what an export does not need is not fetched'\n"
        "one = AutoModelForSequenceClassification.from_pretrained('me/sparse', subfolder='tasks/three')\n"
        "assert one.config.id2label == {0: 'a', 1: 'b', 2: 'c'}\n"
    )
    done = run_with_hub(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    saved, loaded = load_file(folder / "model.safetensors"), torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.slow
def test_the_command_and_the_model_s_own_method(hub, folder, tmp_path):
    store, address = hub
    code = (
        "import sys; from hf_disparse import MultitaskModel; from hf_disparse.cli.main import main\n"
        f"MultitaskModel.from_pretrained({str(folder)!r}).push_to_hub('me/own')\n"
        f"sys.argv = ['hf-disparse', 'push', {str(folder)!r}, 'me/compact', '--format', 'compact', '--private']\n"
        "main()\n"
    )
    done = run_with_hub(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {address}/me/compact/commit/{store.head('me/compact')}" in done.stdout
    assert store.repos["me/compact"]["private"] and not store.repos["me/own"]["private"]
    assert "structure" in json.loads(store.files("me/compact")["config.json"][0])["quantization_config"]
    assert "model.safetensors" in store.files("me/own")
    code = "import hf_disparse; from transformers import AutoModel; AutoModel.from_pretrained('me/compact')"
    assert run_with_hub(code, address, tmp_path).returncode == 0
    stranger = run_with_hub(code, address, tmp_path / "stranger", token=None)
    assert stranger.returncode != 0 and "me/compact" in stranger.stderr


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("wrong", r"the token is not valid; pass another `token`.*\(status 401\)"),
        ("reader", r"the token has no permission to write there \(status 403\)"),
    ],
)
def test_a_token_without_permission_is_refused(token, message, hub, folder):
    store, address = hub
    store.create("me/sparse", private=False)
    with pytest.raises(UserError, match=message):
        push(folder, "me/sparse", api=client(address, token))
    assert not store.files("me/sparse")


def test_an_interrupted_upload_resumes(hub, folder, monkeypatch):
    store, address = hub
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub sleeps between its own retries
    store.cut_off = 100
    with pytest.raises(UserError, match=r"the upload was interrupted.*\nNothing was committed\. Push again to resume"):
        push(folder, "me/sparse", with_tasks=True, api=client(address))
    assert not store.files("me/sparse")
    store.cut_off = 0
    push(folder, "me/sparse", with_tasks=True, api=client(address))
    first = len(store.puts)
    push(folder, "me/sparse", with_tasks=True, api=client(address))
    assert len(store.puts) == first, "what is there is not sent again"


def test_a_commit_made_in_the_meantime_is_kept(hub, folder):
    store, address = hub
    push(folder, "me/sparse", api=client(address))

    def other():
        store.before_commit = None
        store.commit("me/sparse", {**store.files("me/sparse"), "theirs.txt": (b"theirs", False)})

    store.before_commit = other
    with pytest.raises(UserError, match=r"someone else pushed to it in the meantime; .* \(status 412\)"):
        push(folder, "me/sparse", "plain", api=client(address))
    push(folder, "me/sparse", "plain", api=client(address))
    assert "theirs.txt" in store.files("me/sparse"), "their commit is built upon"


def test_an_unreachable_hub_is_reported(folder):
    with pytest.raises(UserError, match="the upload was interrupted"):
        push(folder, "me/sparse", api=client("http://127.0.0.1:9"))


@pytest.mark.slow
def test_shards_are_pushed_with_their_index(hub, folder, tmp_path):
    _, address = hub
    model = MultitaskModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    push(tmp_path / "shards", "me/shards", "plain", api=client(address))
    code = (
        "from hf_disparse import MultitaskModel\n"
        f"MultitaskModel.from_pretrained('me/shards').save_pretrained({str(tmp_path / 'whole')!r})\n"
    )
    done = run_with_hub(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    pulled = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(tensor, pulled[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_pushed_is_refused_before_the_export(folder, tmp_path):
    with pytest.raises(UserError, match="repo_id: Repo id must be in the form"):
        push(folder, "a/b/c", api=client("http://127.0.0.1:9"))
    plain_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="with_tasks: only applies to a MultitaskModel"):
        push(tmp_path, "me/sparse", with_tasks=True, api=client("http://127.0.0.1:9"))


def test_the_command_speaks_of_its_own_arguments(folder, tmp_path):
    refused("push", folder, "a/b/c", names=("error: REPO: Repo id must be in the form",))
    plain_model().save_pretrained(tmp_path)
    refused("push", tmp_path, "me/sparse", "--with-tasks", names=("error: --with-tasks: only applies to",))


def test_an_unknown_form_is_refused(folder):
    with pytest.raises(UserError, match="form: expected packed, compact or plain, got 'zip'"):
        push(folder, "me/sparse", "zip", api=client("http://127.0.0.1:9"))


def test_a_trainer_pushes_while_it_trains(hub, tmp_path, monkeypatch):
    store, _ = hub
    monkeypatch.setenv("HF_TOKEN", "good")
    pushing = dict(push_to_hub=True, hub_model_id="me/trained", hub_strategy="checkpoint", hub_always_push=True)
    trainer = DisparseTrainer(
        tiny_model(),
        arguments(tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1, **pushing),
        pruning_config=PruningConfig(sparsity=0.5, score_batches=2),
        train_dataset=three_datasets(),
        eval_dataset=three_datasets(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    files = store.files("me/trained")
    assert {"last-checkpoint/pruning_masks.safetensors", "last-checkpoint/optimizer.pt", "pruning_config.json"} <= set(
        files
    )
    assert len(store.repos["me/trained"]["commits"]) > 2
    card = ModelCard(files["README.md"][0].decode())
    assert "zeros among the prunable weights | 50.0 %" in card.text and len(card.data.eval_results) == 3

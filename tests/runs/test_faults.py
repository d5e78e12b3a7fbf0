"""What happens to runs: processes that are killed, disks that fill up, files and peers that vanish."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants

from hf_disparse import UserError, last_whole_checkpoint
from hf_disparse.export import push
from tests.helpers.commands import hf_disparse, refused, snapshot, write_inputs, write_recipe
from tests.helpers.hub_server import serve
from tests.helpers.processes import (
    child,
    export_command,
    in_processes,
    messages,
    push_command,
    train_as_rank,
    train_command,
    train_telling,
    train_where_files_may_not_grow,
    train_where_the_folder_becomes_read_only,
)
from tests.helpers.resuming import CUBIC, STEPS
from tests.helpers.training import assert_same, multitask_trainer, weights

DEATHS = int(os.environ.get("HF_DISPARSE_DEATHS", "6"))
PAUSE = 0.1  # seconds, around each part of a checkpoint and of a pruning step
PLACES = ("checkpoint", "pruning", "push", "training")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    trainer = multitask_trainer(tmp_path_factory.mktemp("whole"), CUBIC, **STEPS)
    trainer.train()
    return weights(trainer.model)


def assert_resumes_to_the_same_bits(folder: Path, undisturbed) -> None:
    trainer = multitask_trainer(folder, CUBIC, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert_same(undisturbed, weights(trainer.model))


# Killed


class Killer:
    """Kills one child at a moment that a seed draws: inside a checkpoint write, a pruning step, a push, or wherever it is."""

    def __init__(self, seed: int, hub):
        self.draw, self.hub, self.inside = random.Random(seed), hub, []

    def kill(self, process, connection) -> None:
        """Returns once the child is dead or done."""
        todo = [place for place in PLACES if place not in self.inside] or PLACES
        kind = todo[len(self.inside) % len(todo)]
        left = self.draw.randint(1, 3)  # which one of its kind
        requests = self.draw.randint(1, 7)  # of a push

        def on_request():
            nonlocal requests
            requests -= 1
            if requests == 0:
                process.kill()

        now = None
        for now in messages(connection):
            if kind == "push" and now in ("checkpoint", "push"):  # a checkpoint is pushed while training goes on
                left -= 1
                if left == 0:
                    self.hub.on_request = on_request
            elif kind == "training" or (now == kind and (left := left - 1) == 0):  # wherever it is by then
                time.sleep(self.draw.uniform(0, {"checkpoint": 6, "pruning": 2, "training": 15}[kind] * PAUSE))
                process.kill()
                break
        now = [now, *messages(connection)][-1]  # where it was
        process.join()
        self.hub.on_request = None
        assert process.exitcode in (0, -signal.SIGKILL) and isinstance(now, str | None), now
        if process.exitcode:
            self.inside.append(kind if kind == "push" else now)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_bits_of_the_undisturbed_one(tmp_path):
    """HF_DISPARSE_DEATHS=30 makes it as many. A run that survives to its end is compared, and another one begins."""
    whole, killed, ends = tmp_path / "whole", tmp_path / "killed", 0
    with serve() as (hub, address):
        with child(train_telling, str(whole), address, 0.0) as (process, connection):
            assert list(messages(connection))[-1] == "end"
        expected, masks = torch.load(whole / "end.pt", weights_only=True)
        pushed = {name: hub.files("me/run")[name] for name in ("model.safetensors", "config.json")}
        killer = Killer(0, hub)
        while (go_on := len(killer.inside) < DEATHS or set(killer.inside) != set(PLACES)) or not ends:
            assert len(killer.inside) < 5 * DEATHS, killer.inside
            with child(train_telling, str(killed), address, PAUSE) as (process, connection):
                if go_on:
                    killer.kill(process, connection)
                else:
                    assert list(messages(connection))[-1] == "end"
            if (killed / "end.pt").is_file():
                ours = torch.load(killed / "end.pt", weights_only=True)
                assert_same(expected, ours[0])
                assert_same(masks, ours[1])
                assert {name: hub.files("me/run")[name] for name in pushed} == pushed
                ends += 1
                shutil.rmtree(killed)
                del hub.repos["me/run"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert (
        hf_disparse("train", write_recipe(folder, {**recipe, "output_dir": str(folder / "run")}), "--no-analysis")[0]
        == 0
    )
    return folder / "run"


def contents(hub) -> dict:
    """But for the card, which tells of times."""
    return {name: content for name, content in hub.files("me/sparse").items() if name != "README.md"}


@pytest.mark.slow
def test_a_push_that_is_killed_commits_nothing_or_everything(finished, monkeypatch):
    """At every request that it makes, until it is through; the next one ends as if nothing had been."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    died, whole = 0, None
    while whole is None:
        with serve() as (hub, address), child(push_command, str(finished), address) as (process, connection):
            left = died + 1

            def on_request(process=process):
                nonlocal left
                left -= 1
                if left == 0:
                    process.kill()

            hub.on_request = on_request
            answers = list(messages(connection))
            hub.on_request = None
            process.join()
            before = contents(hub) if hub.repos else {}
            if answers:
                assert answers[0][0] == 0, answers[0][2]
                whole = before
            else:
                died += 1
                push(finished, "me/sparse", api=HfApi(endpoint=address, token="good"))
                again = contents(hub)
                assert before in ({}, again)
    assert died >= 4, "make the repository, prepare, send, commit"
    assert again == whole


@pytest.mark.slow
def test_a_terminated_export_leaves_nothing_behind(finished, tmp_path):
    with child(export_command, str(finished), str(tmp_path / "packed")) as (process, connection):
        assert next(messages(connection)) == "writing"
        assert len(snapshot(tmp_path)) > 1
        process.terminate()
        process.join(60)
        assert process.exitcode == 143
    assert snapshot(tmp_path) == {}


def test_a_terminated_run_says_where_it_goes_on(recipe, tmp_path):
    path = write_recipe(tmp_path, {**recipe, "output_dir": str(tmp_path / "run")})
    with child(train_command, path) as (process, connection):
        told = messages(connection)
        assert (next(told), next(told)) == ("sealed", "sealed")
        process.terminate()
        assert f"the same command goes on from {tmp_path}/run/dense/checkpoint-2" in next(told)
        process.join(60)
        assert process.exitcode == 143
    assert not (tmp_path / "run" / "dense" / "checkpoint-4").exists(), "half of one is of no use"


# Refused by the system


@pytest.mark.parametrize("size", [60_000, 20_000, 1_000])  # the optimizer, the weights, config.json no longer fit
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path, undisturbed, size):
    with child(train_where_files_may_not_grow, str(tmp_path), size) as (_, connection):
        ((kind, said),) = messages(connection)
    assert kind == "refused" and len(said.splitlines()) == 2, said
    assert said.startswith(f"output_dir: cannot write to {tmp_path}/checkpoint-6: ")
    assert "MB are free there" in said and "resumes from the last whole checkpoint" in said
    assert not (tmp_path / "checkpoint-6").exists(), "half of one is of no use, and a disk may be full of it"
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


def test_a_folder_that_becomes_read_only_is_one_error_and_the_last_checkpoint_stays(tmp_path, undisturbed):
    with child(train_where_the_folder_becomes_read_only, str(tmp_path)) as (_, connection):
        ((kind, said),) = messages(connection)
    assert (kind, len(said.splitlines())) == ("refused", 2)
    assert f"cannot write to {tmp_path}/checkpoint-6: Permission denied" in said
    os.chmod(tmp_path, 0o700)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert_resumes_to_the_same_bits(tmp_path, undisturbed)


def test_a_disk_that_is_full_at_the_masks_says_so(tmp_path, monkeypatch):
    def full(masks, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("hf_disparse.trainer.checkpoints.save_masks", full)
    with pytest.raises(UserError, match=r"cannot write to .*checkpoint-6: No space left on device: .*masks"):
        multitask_trainer(tmp_path, CUBIC, **STEPS).train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3"), "before anything was pruned"


def test_a_data_file_that_vanished_is_one_error_and_the_run_goes_on_once_it_is_back(recipe, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    inputs = Path(shutil.copytree(Path(recipe["output_dir"]).parent, tmp_path / "inputs"))
    for name in ("results.json", "sparse/phase.json"):
        (folder / name).unlink()
    two = {**recipe["tasks"]["two"], "data": str(inputs / "two.csv")}
    mine = {**recipe, "tasks": {**recipe["tasks"], "two": two}, "output_dir": str(folder)}
    write_recipe(folder, mine)
    (inputs / "two.csv").rename(inputs / "gone.csv")
    before = snapshot(folder)
    path = write_recipe(tmp_path, mine)
    refused("train", path, names=("tasks.two.data", "there is no file", "two.csv"))
    assert snapshot(folder) == before
    (inputs / "gone.csv").rename(inputs / "two.csv")
    assert hf_disparse("train", path, "--no-analysis")[0] == 0
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


# Among processes


@pytest.mark.slow
def test_a_dead_rank_ends_the_other_with_one_error_and_both_resume(tmp_path):
    def run(name: str, deaths: dict[int, int]):
        return in_processes(2, train_as_rank, str(tmp_path / name), deaths)

    ([whole], _), ([same], _) = run("whole", {})
    ([(kind, said)], _), killed = run("killed", {1: 8})
    assert killed == ([], -signal.SIGKILL)
    assert kind == "refused" and len(said.splitlines()) == 2, said
    assert "another process has stopped responding" in said and "Training resumes" in said
    assert last_whole_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-6")
    ([ours], _), ([theirs], _) = run("killed", {})
    for _, state, _ in (same, ours, theirs):
        assert list(state) == list(whole[1])
        assert all(np.array_equal(state[name], value) for name, value in whole[1].items())

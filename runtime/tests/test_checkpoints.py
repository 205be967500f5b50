"""Checkpoints: written by any number of processes and read by any other, after SIGTERM and Ctrl-C too."""

import os
import signal
import time

import pytest
import torch

import stepdpo
from conftest import (
    make_config,
    make_flags,
    read_metrics,
    start_ranks,
    train_by_flags,
    weights_of,
)
from runtime import checkpoints, weights


@pytest.mark.parametrize("length, before, after", [(10, 4, 3), (3, 8, 2), (7, 2, 8), (1, 3, 5), (16, 4, 4)])
def test_rows_find_their_way_from_any_number_of_shards_to_any_other(length, before, after):
    whole = torch.arange(length)
    old_places = [weights.rows_of_shard(length, shard, before) for shard in range(before)]
    new_places = [weights.rows_of_shard(length, shard, after) for shard in range(after)]
    stored = [whole[start:stop] for start, stop in old_places]
    assert torch.equal(torch.cat(stored), whole)
    assert [len(x) for x in stored if len(x)] == [len(x) for x in whole.chunk(before)]  # as FSDP does it
    for start, stop in new_places:
        rows = torch.full((stop - start,), -1)
        for old, place in zip(stored, old_places, strict=True):
            checkpoints.copy_common_rows(rows, (start, stop), old, place)
        assert torch.equal(rows, whole[start:stop])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_preempted_run_saves_and_resumes_to_the_same_losses(workplace, run, tmp_path, number):
    out, held_out = tmp_path / "out", workplace / "eval.jsonl"
    flags = make_flags(workplace, out, eval_data=held_out, eval_every=3, save_every=2)
    (child,) = start_ranks(1, tmp_path, train_by_flags, flags)
    while not (out / "metrics.jsonl").exists() or not read_metrics(out):  # it has been evaluated
        assert child.is_alive(), (tmp_path / "said-0").read_text()
        time.sleep(0.01)
    os.kill(child.pid, number)
    child.join(100)
    assert child.exitcode == 128 + number and "--resume continues" in (tmp_path / "said-0").read_text()
    (saved,) = (out / "checkpoints").iterdir()  # only the newest is kept
    assert 1 <= int(saved.name[-6:]) < 6 and not (out / "model").exists()

    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 1}\n{"torn')  # what a kill -9 after the checkpoint would leave
    stepdpo.train(make_config(workplace, out, resume=True, eval_data=held_out, eval_every=3))
    for ours, theirs in zip(read_metrics(out), read_metrics(run), strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "eval/loss"):
            assert ours.get(key) == theirs.get(key)
    assert weights_of(out / "model") == weights_of(run / "model")

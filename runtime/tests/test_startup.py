"""What a run does before it trains: processes, what it says, the self-check, what it refuses."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import stepdpo
from conftest import (
    ENVIRONMENT,
    HERE,
    TORCHRUN,
    free_port,
    losses_of,
    make_config,
    make_flags,
    weights_of,
)
from runtime import architectures, startup, weights
from runtime.messages import InputError


def test_start_up_says_what_will_happen(workplace, tmp_path, capsys):
    stepdpo.train(make_config(workplace, tmp_path, max_steps=1, max_length=110))
    out = capsys.readouterr().out
    for expected in ("Qwen2ForCausalLM", "dropped 6: longer than --max-length 110 (first: ",
                     "sharing the prefix saves", "[[chosen> So 0 + 0 = 0<]]",
                     "packed and plain log-probabilities differ by", "model in"):
        assert expected in out


def test_the_self_check_stops_a_run_whose_attention_ignores_the_segments(workplace, tmp_path, monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def all_see_all(module, query, key, value, attention_mask, **kwargs):
        architectures._current.calls += 1
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setattr(architectures, "segment_attention", all_see_all)
    message = "Qwen2ForCausalLM: packed .* differ from plain ones by .* so it cannot be trained here"
    with pytest.raises(InputError, match=message):
        stepdpo.train(make_config(workplace, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_answers_of_a_model_that_no_process_can_hold_are_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "count_parameters", lambda folder: 10**15)
    with pytest.raises(InputError, match=r"would hold the model, 4,000,000 GB.*pairs solve --server"):
        stepdpo.train_and_compare(make_config(workplace, tmp_path / "out", test_problems=HERE / "demo/test.jsonl"))
    assert not (tmp_path / "out/run.json").exists()


def test_torchrun_leaves_no_core_idle(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for environment in ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "2"}, {}):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            startup.use_cores_and_memory_well()
    assert asked == [3]


def test_processes_that_share_copies_must_come_out_even(workplace, tmp_path):
    with pytest.raises(InputError, match="--shard-size 3: must divide the number of processes, 1"):
        stepdpo.train(make_config(workplace, tmp_path / "out", shard_size=3))


# ---------------------------------------------------------------------------------------------- several nodes


def launch_nodes(workplace, outs: Sequence[Path], homes: Path, processes: int, **options) -> list[tuple]:
    """A torchrun for each output folder, as on nodes of their own. Returns what each printed, and status."""
    nodes, port = [], free_port()
    for number, out in enumerate(outs):
        home = homes / f"home{number}"
        home.mkdir()
        command = [*TORCHRUN, str(processes), "--nnodes", str(len(outs)), "--node-rank", str(number),
                   "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command.remove("--standalone")
        nodes.append(subprocess.Popen(
            [*command, "stepdpo.py", *make_flags(workplace, out, **options)], cwd=HERE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {"HOME": str(home), "STEPDPO_CACHE": str(home / "cache")}))
    return [(node.communicate(timeout=200)[0], node.returncode) for node in nodes]


@pytest.mark.slow
def test_nodes_may_share_copies_or_have_one_each(workplace, run, tmp_path):
    out = tmp_path / "out"
    options = dict(eval_data=workplace / "eval.jsonl", eval_every=3, save_every=3)
    nodes = launch_nodes(workplace, [out, out], tmp_path, 2, shard_size=2, **options)
    assert [status for _, status in nodes] == [0, 0], nodes
    assert losses_of(out) == pytest.approx(losses_of(run), abs=1e-5)
    assert (tmp_path / "home0/cache").exists() and not (tmp_path / "home1/cache").exists()

    # Two shards, of two copies each; and one process can go on from them.
    assert len([*next((out / "checkpoints").iterdir()).glob("weights.*")]) == 2
    exported = weights_of(out / "model")
    shutil.rmtree(out / "model")
    stepdpo.train(make_config(workplace, out, resume=True, **options))
    assert weights_of(out / "model") == exported


@pytest.mark.slow
def test_nodes_that_do_not_share_the_output_folder_are_told_so(workplace, tmp_path):
    nodes = launch_nodes(workplace, [tmp_path / "a", tmp_path / "b"], tmp_path, 1)
    for output, status in nodes:
        assert status != 0 and "rank 1 on " in output, output
        assert "use one that all nodes share" in output, output

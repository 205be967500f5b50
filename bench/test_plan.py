"""What bench/plan.py promises: its formula is what the trainer allocates, and its table is README's."""

import sys

import pytest
import torch
import transformers

from conftest import HERE
from data import Pair
from runtime import planning
from runtime.commands import run_command
from runtime.messages import InputError

sys.path.insert(0, str(HERE / "bench"))
import plan  # noqa: E402

from runtime.live_bytes import LiveBytes  # noqa: E402

SMALL = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=9000, max_position_embeddings=2048)
PAIRS = [Pair([1] * 200, [1] * 50, [1] * 50, "")] * 64


@pytest.mark.parametrize("tied, flags", [
    (False, ""),
    pytest.param(False, "--no-activation-checkpointing --no-share-prefix", marks=pytest.mark.slow),
    pytest.param(False, "--offload gradients --tokens-per-micro-batch 600", marks=pytest.mark.slow),
    (False, "--offload all --shard-size 2"),
    pytest.param(True, "--offload moments --tokens-per-micro-batch 300", marks=pytest.mark.slow),
    (True, "--no-activation-checkpointing"),
    pytest.param(False, "--tokens-per-micro-batch 8192 --batch-size 4",  # one micro-batch
                 marks=pytest.mark.slow),
    (False, "--gather-once --tokens-per-micro-batch 300 --batch-size 8"),
    *(pytest.param(tied, f"--gather-once {flags}", marks=pytest.mark.slow) for tied, flags in [
        (False, "--tokens-per-micro-batch 300"), (False, "--tokens-per-micro-batch 8192 --batch-size 4"),
        (True, "--tokens-per-micro-batch 600 --offload gradients"),
        (False, "--no-activation-checkpointing --shard-size 1")]),
])
def test_the_formula_is_what_the_trainer_allocates(no_process_group, tied, flags):
    hf_config = transformers.Qwen2Config(**SMALL, tie_word_embeddings=tied)
    predicted = plan.Planner(hf_config, PAIRS, 4).plan(plan.parse(["--batch-size", "16", *flags.split()]))
    traced = plan.trace(hf_config, PAIRS, 4, predicted.config)
    assert predicted.bytes == pytest.approx(traced["device"], rel=0.01 if "once" in flags else 0.05)
    assert predicted.host == pytest.approx(traced["host"], rel=0.01)


def test_a_mixtures_idle_experts_take_memory_but_no_time():
    options = dict(num_experts=8, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    shapes = [planning.shape_of(transformers.Qwen2MoeConfig(**SMALL, **options, num_experts_per_tok=count))
              for count in (2, 8)]
    assert shapes[0].all == shapes[1].all
    assert shapes[1].active - shapes[0].active == 3 * 6 * 3 * 64 * 128  # layers, experts, matrices of one


def test_live_counts_storages_once_and_only_while_they_live():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[10:]
        live.move(b)
        c = torch.ones(500)
        c.untyped_storage().resize_(0)
        c.untyped_storage().resize_(400)
        del a
        assert live.now == {"device": 400, "host": 4000} and live.peak == {"device": 4000, "host": 4000}
        del b, c
    assert not any(live.now.values())


@pytest.mark.slow
def test_readme_has_the_table_and_it_says_what_it_has_always_said():
    text = plan.table()
    assert text in (HERE / "bench/README.md").read_text()
    for row in ("Llama-3-70B-Instruct | 8 x 80 GB | `--offload gradients` |",
                "Llama-3-70B-Instruct | 8 x 141 GB | `--offload moments` |",
                "Qwen2-72B-Instruct | 8 x 80 GB | `--offload gradients` |",
                "Qwen2-72B-Instruct | 8 x 141 GB | `--offload moments` |",
                "Qwen2-7B-Instruct | 8 x 80 GB | `--no-activation-checkpointing` |"):
        assert row in text


def test_several_nodes_have_a_copy_each_where_it_fits():
    planner = plan.Planner(plan.read_config("Qwen/Qwen2-7B-Instruct"), PAIRS, 16)
    flags, advised = plan.advise(planner, plan.parse(["--shard-size", "3"]), 8, "80 GB")
    assert flags == "--no-activation-checkpointing --shard-size 8" and advised.fits(85e9)
    planner = plan.Planner(plan.read_config("Qwen/Qwen2-72B-Instruct"), PAIRS, 16)
    # One copy over both nodes, and nothing in host memory, rather than a copy each with --offload.
    assert plan.advise(planner, plan.parse([]), 8, "141 GB")[0] == "--no-activation-checkpointing"


def test_real_pairs_give_real_lengths(capsys, monkeypatch):
    flags = "--model demo/model --data demo/pairs.jsonl --instruction= --gpus 2 --batch-size 32"
    monkeypatch.setattr(sys, "argv", ["bench/plan.py", *flags.split()])
    monkeypatch.chdir(HERE)
    plan.main()
    text = capsys.readouterr().out
    assert "96 optimizer steps of 32 pairs, 270 tokens each, in" in text and "assumed" not in text


def test_what_cannot_be_trained_is_not_planned(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(InputError, match="BloomForCausalLM is not supported"):
        plan.Planner(plan.read_config(str(tmp_path)), PAIRS, 8)


@pytest.mark.parametrize("flags, message", [
    ("", "--model is needed: a folder, a config.json, a hub name, or one of Qwen/Qwen2-7B-Instruct"),
    ("--model /nowhere", "--model /nowhere: no config.json can be read there"),
    ("--model Qwen/Qwen2-7B-Instruct --gpus 12", "--gpus-per-node 8: must divide --gpus 12"),
    ("--model Qwen/Qwen2-7B-Instruct --shard-size 3", "--shard-size 3: must divide --gpus 8"),
    ("--model Qwen/Qwen2-7B-Instruct --utilisation 40", "must be above 0 and at most 1, got 40"),
    ("--model Qwen/Qwen2-7B-Instruct --offload some", "--offload: invalid choice: 'some'"),
    ("--model Qwen/Qwen2-7B-Instruct --tokens-per-micro-batch 9", "more than --tokens-per-micro-batch 9"),
])
def test_bad_flags_are_one_line_that_names_them(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/plan.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        run_command("bench/plan.py", plan.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

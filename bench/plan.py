#!/usr/bin/env python3
"""Memory before money: what a run holds on each GPU and host, how long it takes, and which flags make it fit.

    python bench/plan.py --model Qwen/Qwen2-72B-Instruct --gpus 8
    python bench/plan.py --model FOLDER --gpus 16 --gpus-per-node 8 --data pairs.jsonl --max-length 2048
    python bench/plan.py --model config.json --offload moments --trace   # the trainer itself, on fake tensors
    python bench/plan.py --table                           # the paper's large models, as in bench/README.md
    python bench/plan.py --measure                         # predictions and real runs, on this CPU

It takes the trainer's flags, and needs neither a GPU nor weights: a config.json is enough, and of the models
in the table their name. The arithmetic, and what it counts, is in runtime/planning.py.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from common import ROOT, SHAPES, qwen2
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import stepdpo
from data import Pair
from runtime import offload, startup, weights
from runtime.commands import run_command
from runtime.flags import OFFLOADS, POSITIVE_INT, TEXT, Parser, checked, expand
from runtime.live_bytes import LiveBytes
from runtime.messages import InputError
from runtime.planning import Plan, Planner, fake_tensors, states_of, tokens_in
from runtime.rows import read_pairs
from runtime.templates import read_tokenizer

MODELS = {  # their config.json, as far as sizes depend on it
    "Qwen/Qwen2-7B-Instruct": {"model_type": "qwen2", **SHAPES["qwen2-7b"]},
    "Qwen/Qwen1.5-32B-Chat": {"model_type": "qwen2", **qwen2(5120, 27392, 64, 40, 8, 152064, False)},
    "Qwen/Qwen2-57B-A14B-Instruct": {
        "model_type": "qwen2_moe", **qwen2(3584, 18944, 28, 28, 4, 151936, False), "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480},
    "meta-llama/Meta-Llama-3-70B-Instruct": {
        "model_type": "llama", **qwen2(8192, 28672, 80, 64, 8, 128256, False)},
    "Qwen/Qwen2-72B-Instruct": {"model_type": "qwen2", **qwen2(8192, 29568, 80, 64, 8, 152064, False)},
}
CARDS = {"80 GB": 85e9, "141 GB": 150e9}  # what H100 (or A100) and H200 have, in bytes
PEAK_FLOPS, LINK = 989e12, 25e9  # dense bf16 of H100 and H200; bytes per second of PCIe, each way
PAPER = dict(pairs=10_795, prefix=200, step=50)  # Math-Step-DPO-10K; tokens, assumed without --data
UTILISATION = 0.4  # of PEAK_FLOPS
HOST_PROCESS = 4e9  # host memory of a rank beside its tensors: Python, torch, CUDA


def read_config(name: str) -> transformers.PretrainedConfig:
    """Of a model in the list above, a folder, a config.json or the hub."""
    if name in MODELS:
        return transformers.AutoConfig.for_model(**MODELS[name])
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever an odd file or the hub's client leads to
        raise InputError(
            f"--model {name}: no config.json can be read there ({' '.join(str(error).split())[:200]}); "
            f"give a folder, a config.json, a hub name, or one of {', '.join(MODELS)}") from None


# -------------------------------------------------------------------------------------------------- the trace


def train_steps(policy: nn.Module, pairs: Sequence[Pair], config: stepdpo.Config, live: LiveBytes,
                steps: int) -> None:
    """Optimizer steps of the trainer, with what they hold in host memory counted there."""
    optimizer = offload.make_adamw(policy.parameters(), config.offload)
    for parameter in policy.parameters():
        for name in ("exp_avg", "exp_avg_sq") if config.offload else ():
            live.move(optimizer.state[parameter][name])
        if config.offload == "gradients":
            live.move(optimizer.gradients[parameter])
        if config.offload == "all":
            live.move(parameter.to_local())
            parameter.register_post_accumulate_grad_hook(lambda it: live.move(it.grad.to_local()))
    reference = torch.zeros(2, len(pairs))
    for step in range(steps):
        live.start_again()
        indices = data.indices_of_step(step, len(pairs), config.batch_size, config.seed)
        stepdpo.train_step(step, policy, optimizer, pairs, indices, reference, config)


def trace(hf_config: transformers.PretrainedConfig, pairs: Sequence[Pair], ranks: int,
          config: stepdpo.Config) -> Counter:
    """The most bytes in each place, "device" and "host", of rank 0 in its second optimizer step.

    It is the trainer's own code, on fake tensors and a process group that sends nothing.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = startup.mesh_of_ranks(config.shard_size)  # a real one, made before tensors are fake
        with tempfile.TemporaryDirectory() as folder, fake_tensors(cuda=True) as live, \
                mock.patch.object(startup, "mesh_of_ranks", lambda size: mesh), \
                mock.patch.object(weights, "load", lambda policy, folder: None):
            hf_config.save_pretrained(folder)
            train_steps(stepdpo.build(folder, config), pairs, config, live, steps=2)
            return live.peak
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------- from a command to a plan


def advise(planner: Planner, config: stepdpo.Config, per_node: int, card: str) -> tuple[str, Plan] | None:
    """(flags, plan) of the first setting, of those that cost little to those that cost much, that fits."""
    settings: list[dict[str, Any]] = [{"activation_checkpointing": False}]
    settings += [{"activation_checkpointing": True, "offload": offload} for offload in (None, *OFFLOADS)]
    settings += [{**settings[-1], "tokens_per_micro_batch": 2**power} for power in range(13, 8, -1)]
    # One copy of the model in each node, where it fits there: then only sums of gradients leave a node.
    shards = [per_node, None] if per_node < planner.ranks else [None]
    for setting, shard in itertools.product(settings, shards):
        setting = {"offload": None, **setting, "shard_size": shard}
        with contextlib.suppress(InputError):  # a pair may be longer than the budget
            plan = plan_on(card, planner, stepdpo.Config(**{**vars(config), **setting}))
            if plan.fits(CARDS[card]):
                return flags_of(setting), plan
    return None


def plan_on(card: str, planner: Planner, config: stepdpo.Config) -> Plan:
    """What a run does there: if nothing is said about --gather-once, that is where it fits."""
    if config.gather_once is None:
        once = planner.plan(stepdpo.Config(**{**vars(config), "gather_once": True}))
        if once.fits(CARDS[card]):
            return once
    return planner.plan(config)


def flags_of(setting: dict[str, Any]) -> str:
    """As on the command line, without what is the default on a GPU."""
    flags = [] if setting.pop("activation_checkpointing") else ["--no-activation-checkpointing"]
    flags += [f"--{name.replace('_', '-')} {value}" for name, value in setting.items() if value]
    return " ".join(flags)


def parse(argv: Sequence[str]) -> stepdpo.Config:
    """The trainer's flags, with the defaults that they have on a GPU."""
    needed = ["--model", "-", "--data", "-", "--output-dir", "-"]
    return stepdpo.parse([*needed, "--dtype", "bfloat16", "--activation-checkpointing", *argv])


def pairs_of(config: stepdpo.Config) -> list[Pair]:
    """The pairs of --data; without it as many as the paper has, all of one length."""
    if config.data != ["-"]:
        with contextlib.redirect_stdout(None):
            return read_pairs(read_tokenizer(config.model), config)[0]
    step = [0] * PAPER["step"]
    return [Pair([0] * PAPER["prefix"], step, step, "an average pair")] * PAPER["pairs"]


def seconds_of(planner: Planner, plan: Plan, utilisation: float) -> tuple[float, float, float]:
    """(FLOPs of an optimizer step, seconds of it, seconds of the whole run). FLOPs are those that are done,
    recomputed ones too; what --offload moves is not taken to overlap with them."""
    shape, work, config = planner.shape, plan.work, plan.config
    steps_per_epoch = data.steps_per_epoch(len(planner.pairs), config.batch_size)
    forward = 2 * shape.active * work.tokens + 4 * shape.heads * shape.layers * work.scores
    passes = 4 if config.activation_checkpointing else 3  # a backward is two forwards
    epoch = passes * forward + 8 * shape.end * work.trained
    reference = forward + 2 * shape.end * work.trained

    m = 1 if config.gather_once else work.micro_batches
    moved = 4 * shape.all / (config.shard_size or planner.ranks)
    weights_up = 1 if config.gather_once else 2 * m
    up = {None: 0, "moments": 2, "gradients": 2 + m, "all": weights_up + 4}[config.offload]
    down = {None: 0, "moments": 2, "gradients": 2 + m, "all": m + 3}[config.offload]
    rate = planner.ranks * PEAK_FLOPS * utilisation
    step = epoch / steps_per_epoch / rate + max(up, down) * moved / LINK
    return epoch / steps_per_epoch, step, work.steps * step + reference / rate


def host_of(planner: Planner, offload: str | None, per_node: int, config: stepdpo.Config) -> float:
    """Bytes of one host: what all its ranks have there, and the processes themselves."""
    _, on_host = states_of(planner.shape.all / (config.shard_size or planner.ranks), offload)
    return per_node * (sum(on_host.values()) + HOST_PROCESS)


def report(planner: Planner, argv: Sequence[str], per_node: int, utilisation: float, traced: bool) -> None:
    """Print what a run with these flags takes, and which flags to use."""
    plan = planner.plan(parse(argv))
    config, work, shape = plan.config, plan.work, planner.shape
    assumed = "" if config.data != ["-"] else (
        f" (assumed, as there is no --data: {PAPER['prefix']} + 2 x {PAPER['step']} tokens)")
    fullest = max(tokens_in(batch, config) for batch in work.batches)
    flops, step, run = seconds_of(planner, plan, utilisation)

    print(f"model       {config.model}: {shape.all / 1e6:,.1f}M parameters in {shape.layers} layers, a "
          f"token meets {(shape.active + shape.end) / 1e6:,.1f}M")
    print(f"run         {planner.ranks} GPUs, {work.steps} optimizer steps of {config.batch_size} pairs, "
          f"{work.tokens / len(planner.pairs):.0f} tokens each{assumed}, in micro-batches of at most "
          f"{fullest:,}")
    gathered = "once in an optimizer step" if config.gather_once else "in every micro-batch"
    print(f"one GPU     {plan.bytes / 1e9:.2f} GB at most, {plan.peak}, with layers gathered {gathered}:")
    for name, size in sorted(plan.moments[plan.peak].items(), key=lambda item: -item[1]):
        if size:
            print(f"            {size / 1e9:7.2f}  {name}")
    hosts = [f"{host_of(planner, offload, per_node, config) / 1e9:,.0f} GB"
             + (f" with --offload {offload}" if offload else "") for offload in (None, *OFFLOADS)]
    print(f"one host    {', '.join(hosts)}")
    print(f"time        {flops / 1e15:,.2f} PFLOP, {step:.1f} s for an optimizer step, {utilisation:.0%} of "
          f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s; {run / 3600:.1f} hours in all")
    for card in CARDS:
        advice = advise(planner, parse(argv), per_node, card)
        words = "too small with any flags: take more GPUs"
        if advice:
            flags, best = advice
            words = f"with {flags or 'the defaults'} {best.bytes / 1e9:.2f} GB"
            words += ", with layers gathered once in an optimizer step" if best.config.gather_once else ""
        print(f"{card:12}{'fits' if plan.fits(CARDS[card]) else 'does not fit'}; best: {words}")
    if traced:
        peak = trace(planner.hf_config, planner.pairs, planner.ranks, config)
        off = plan.bytes / peak["device"] - 1
        print(f"traced      {peak['device'] / 1e9:.2f} GB on a GPU, from which the formula is {off:+.1%} "
              f"off; {peak['host'] / 1e9:.2f} GB in a rank's host memory")


def table() -> str:
    """The paper's large models on one node of eight GPUs, as a table in Markdown."""
    lines = ["| model | cards | flags | GB per GPU | GB per host | hours |", "|---|---|---|---|---|---|"]
    for name in MODELS:
        argv = ["--model", name]
        planner = Planner(read_config(name), pairs_of(parse(argv)), 8)
        # As in the paper: half the epochs above 30B.
        argv += ["--epochs", "4"] if planner.shape.all > 30e9 else []
        for card in CARDS:
            flags, plan = advise(planner, parse(argv), 8, card)
            _, _, run = seconds_of(planner, plan, UTILISATION)
            host = host_of(planner, plan.config.offload, 8, plan.config)
            lines.append(f"| {name.split('/')[1]} | 8 x {card} | `{flags}` | {plan.bytes / 1e9:.0f} | "
                         f"{host / 1e9:,.0f} | {run / 3600:.1f} |".replace("``", "none"))
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the formula against real runs

MEASURED = {  # small models of different shapes
    "qwen2, untied": {"model_type": "qwen2", **qwen2(256, 1024, 4, 4, 2, 32000, False)},
    "qwen2, tied": {"model_type": "qwen2", **qwen2(512, 1536, 6, 8, 2, 150000, True)},
    "llama, untied": {"model_type": "llama", **qwen2(1024, 2816, 2, 8, 8, 32000, False)},
}
SETTINGS = ("", "--activation-checkpointing --offload moments",
            "--no-share-prefix --tokens-per-micro-batch 2048 --offload gradients",
            "--activation-checkpointing --tokens-per-micro-batch 512 --offload all",
            "--gather-once --tokens-per-micro-batch 512")


def run_counted(argv: Sequence[str]) -> None:
    """The trainer with these flags, to its end. Prints the most bytes of tensors in an optimizer step."""
    live, peaks, train_step = LiveBytes(), [], stepdpo.train_step

    def counted_step(*args):
        live.start_again()
        metrics = train_step(*args)
        peaks.append(sum(live.peak.values()))
        return metrics

    with mock.patch.object(stepdpo, "train_step", counted_step), live, \
            mock.patch.object(weights, "export", lambda *args: None):
        stepdpo.train(stepdpo.parse(argv))
    print(max(peaks))


def measure() -> list[dict[str, Any]]:
    """Predicted and measured bytes of small random models, in one process without a GPU."""
    rows = []
    for name, options in MEASURED.items():
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
            hf_config = transformers.AutoConfig.for_model(**options)
            transformers.AutoModelForCausalLM.from_config(hf_config).save_pretrained(folder)
            read_tokenizer(f"{ROOT}/demo/model").save_pretrained(folder)
            with open(f"{ROOT}/demo/pairs.jsonl") as file, open(f"{out}/pairs.jsonl", "w") as some:
                some.writelines(itertools.islice(file, 16))

            for number, setting in enumerate(SETTINGS):
                argv = ["--model", folder, "--data", f"{out}/pairs.jsonl", "--output-dir", f"{out}/{number}",
                        "--instruction", "", "--batch-size", "16", "--max-steps", "2", *setting.split()]
                config = stepdpo.parse(argv)
                plan = Planner(hf_config, pairs_of(config), 1, cuda=False).plan(config)
                row = {"model": name, "flags": setting, "predicted": plan.bytes + plan.host,
                       "measured": measured_bytes(argv, cache=folder)}
                rows.append(row)
                print(f"{name:14} {setting:78} {row['measured'] / 1e6:8,.1f} MB, predicted "
                      f"{row['predicted'] / 1e6:8,.1f} ({row['predicted'] / row['measured'] - 1:+.1%})",
                      flush=True)
    return rows


def measured_bytes(argv: Sequence[str], cache: str) -> int:
    """Of a run in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "STEPDPO_CACHE": cache}
    command = [sys.executable, __file__, "--counted", *argv]
    run = subprocess.run(command, text=True, capture_output=True, env=env)
    if run.returncode:
        raise InputError(f"a run with {' '.join(argv)} failed: {run.stderr.strip().splitlines()[-1]}")
    return int(run.stdout.split()[-1])


# ------------------------------------------------------------------------------------------------------ flags


def main() -> None:
    if sys.argv[1:2] == ["--counted"]:  # a child of `measure`
        return run_counted(sys.argv[2:])
    share = checked(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
    parser = Parser("bench/plan.py", description=__doc__, epilog="All other flags are the trainer's.")
    add = parser.add_argument
    add("--model", type=TEXT, help="a folder, a config.json or a hub name")
    add("--gpus", type=POSITIVE_INT, default=8, help="of all nodes together [8]")
    add("--gpus-per-node", type=POSITIVE_INT, help="[8, or all if there are fewer]")
    add("--utilisation", type=share, default=UTILISATION, help=f"share of a GPU's peak [{UTILISATION}]")
    add("--trace", action="store_true", help="let the trainer's own code run on fake tensors too")
    add("--table", action="store_true", help="print the table in bench/README.md instead")
    add("--measure", action="store_true", help="compare with real runs on this CPU instead")
    args, others = parser.parse_known_args(expand(sys.argv[1:]))
    if args.table:
        return print(table())
    if args.measure:
        measure()
        return None
    if not args.model:
        parser.error(f"--model is needed: a folder, a config.json, a hub name, or one of {', '.join(MODELS)}")
    per_node = args.gpus_per_node or min(8, args.gpus)
    if args.gpus % per_node:
        parser.error(f"--gpus-per-node {per_node}: must divide --gpus {args.gpus}")
    argv = ["--model", args.model, *others]
    planner = Planner(read_config(args.model), pairs_of(parse(argv)), args.gpus)
    report(planner, argv, per_node, args.utilisation, args.trace)


if __name__ == "__main__":
    run_command("bench/plan.py", main)

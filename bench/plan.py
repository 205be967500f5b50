#!/usr/bin/env python3
"""Memory before money: what a run holds on each GPU and host, how long it takes, and which flags make it fit.

    python bench/plan.py --model Qwen/Qwen2-72B-Instruct --gpus 8
    python bench/plan.py --model FOLDER --gpus 16 --gpus-per-node 8 --data pairs.jsonl --max-length 2048
    python bench/plan.py --model config.json --offload moments --trace   # the trainer itself, on fake tensors
    python bench/plan.py --table                           # the paper's large models, as in bench/README.md
    python bench/plan.py --measure                         # predictions and real runs, on this CPU

It takes the trainer's flags, and needs neither a GPU nor weights: a config.json is enough, and of the models
in the table their name. Bytes on one GPU, where s ranks share a copy of the model (all, or --shard-size) of N
parameters, E in the embedding, E in the head and P in a layer, and b = 2 in bf16:

    always                        weights 4 N / s, gradients 4 N / s, moments 8 N / s, but what is offloaded
    and the most of
      in the head's backward      head and its gradient 2 E b, next layer P b, tiles of the loss, kept
      as that is reduced          gradient E b, in fp32 4 E, its shards 4 E / s, next layer P b, kept
      in a layer's backward       the layer and the next 2 P b, the gradient before 4 P or 4 E, kept, layer
      in the embedding's          it and its gradient 2 E b, the gradient before 4 P
      as that is reduced          as the head's, with nothing kept
      in the update               visitors from host memory: all numbers of two parameters' shards

"next": FSDP2 gathers one group ahead in backward. "The gradient before": it keeps the fp32 input of the last
reduce-scatter until the next begins. In a step's first micro-batch gradients come one by one; in later ones
all are there. A tied embedding is gathered all the time, and so is its gradient. "kept" is each layer's
input, or without activation checkpointing all that its backward needs; "layer" is what a layer holds in its
backward, recomputed activations and gradients. Both depend on the architecture: a layer is run on fake
tensors, with the fullest batch of the run, and its live tensors are counted.

Nobody counts CUDA's context and NCCL's buffers (CONTEXT), holes between allocations and what kernels take for
themselves (MARGIN). GB are 10^9 bytes, of which an "80 GB" card has 85.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from common import ROOT, SHAPES, qwen2
from memory import LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import kernels
import stepdpo
from data import Pair
from runtime import architectures, offload, startup, weights
from runtime.commands import run_command
from runtime.flags import OFFLOADS, POSITIVE_INT, TEXT, Parser, checked, expand
from runtime.messages import InputError
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
CONTEXT, MARGIN = 2e9, 1.05  # for CUDA's context and NCCL's buffers; for holes between allocations
PEAK_FLOPS, LINK = 989e12, 25e9  # dense bf16 of H100 and H200; bytes per second of PCIe, each way
PAPER = dict(pairs=10_795, prefix=200, step=50)  # Math-Step-DPO-10K; tokens, assumed without --data
UTILISATION = 0.4  # of PEAK_FLOPS
HOST_PROCESS = 4e9  # host memory of a rank beside its tensors: Python, torch, CUDA


# ----------------------------------------------------------------------------------------------- fake tensors


@contextlib.contextmanager
def fake_tensors(cuda: bool) -> Iterator[LiveBytes]:
    """Tensors without memory, whose sizes are counted.

    They are on "cpu", as torch's CPU builds have no fake CUDA tensors. With `cuda` they say that they are on
    a GPU, so that our kernels and attention take the ways that they take there.
    """
    class NoKernel:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    patches = [(Tensor, "item", lambda self: 1.0), (Tensor, "tolist", lambda self: [1.0] * self.numel()),
               (torch.cuda, "is_available", lambda: False),
               (torch, "_fused_adamw_", lambda *args, **options: None)]  # torch would decompose it, and copy
    if cuda:
        patches += [(Tensor, "is_cuda", True),
                    (kernels, "_fold_kernel", NoKernel()), (kernels, "_dtile_kernel", NoKernel())]
    with contextlib.ExitStack() as stack:
        for thing, name, replacement in patches:
            stack.enter_context(mock.patch.object(thing, name, replacement))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(LiveBytes(fake=True))


# ------------------------------------------------------------------------------------------------ the formula


class Shape(NamedTuple):
    """What is known of a model by its configuration, in numbers of parameters."""

    all: int       # N
    active: int    # that a token meets, without embedding and head: of a mixture's experts a few
    end: int       # E, of the embedding, and again of an untied head
    layer: int     # P, of the largest layer
    layers: int
    tied: bool
    hidden: int    # D
    heads: int     # H d, of all heads together


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


def make(hf_config: transformers.PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model, of fake tensors or on the meta device.

    Raises InputError for one that the trainer refuses.
    """
    model = architectures.model_of(hf_config, hf_config.name_or_path or "its configuration", dtype)
    architectures.refuse_unsupported(model)
    return model.eval()


def shape_of(hf_config: transformers.PretrainedConfig) -> Shape:
    with torch.device("meta"):
        model = make(hf_config, torch.float32)
    config = hf_config.get_text_config()
    count = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    end, tied = embedding.numel(), embedding is head
    layers = architectures.decoder_layers(model)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(count, count - end * (1 if tied else 2) - idle_in(layers, config), end, max(sizes),
                 len(layers), tied, config.hidden_size, config.num_attention_heads * head_size)


def idle_in(layers: list[nn.Module], config: transformers.PretrainedConfig) -> int:
    """Parameters that a token does not meet: of a mixture's experts it chooses some."""
    experts = 0
    for layer in layers:
        for parameter in layer.parameters():
            # All experts of a layer are in one tensor (experts, rows, columns).
            experts += parameter.numel() if parameter.dim() == 3 else 0
    all_of_them = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return experts - experts * chosen // all_of_them


class Reached(Exception):
    """A forward has come to the layer that is counted."""


def count_layer(hf_config: transformers.PretrainedConfig, pairs: list[Pair], config: stepdpo.Config,
                cuda: bool) -> tuple[int, int]:
    """(bytes that one layer keeps from its forward, most bytes in its backward, those and its weights'
    gradients included), for a batch of pairs. The layer's output belongs to what comes after it."""
    calls = []

    def stop(layer: nn.Module, *call: Any) -> None:
        calls.append(call)
        raise Reached  # the layers behind it are not wanted

    with fake_tensors(cuda) as live:
        model = make(hf_config, getattr(torch, config.dtype))
        layer = architectures.decoder_layers(model)[0]
        batch = data.pack(pairs, config.share_prefix)
        hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
        with architectures.attending_to(type(model).__name__, batch.segments):
            with torch.no_grad(), contextlib.suppress(Reached):
                model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            hook.remove()
            (hidden, *others), options = calls.pop()
            hidden = torch.empty_like(hidden, requires_grad=True)

            before = live.now["device"]
            output = layer(hidden.clone(), *others, **options)
            output = output[0] if isinstance(output, tuple) else output
            before += output.nbytes
            kept = live.now["device"] - before
            live.start_again()
            output.backward(torch.empty_like(output))
            return kept, live.peak["device"] - before


class Work(NamedTuple):
    """What a run does."""

    steps: int         # optimizer steps
    tokens: int        # of an epoch, in all its batches
    trained: int       # of them those that the head meets
    scores: int        # query-key pairs of an epoch
    micro_batches: int  # per optimizer step, the most
    batches: list[list[Pair]]  # the fullest of the first micro-batches, and of later ones if there are any


def work_of(pairs: Sequence[Pair], ranks: int, config: stepdpo.Config) -> Work:
    """Tokens of an epoch, and the fullest batches of all its optimizer steps."""
    share = config.share_prefix
    per_epoch = data.steps_per_epoch(len(pairs), config.batch_size)
    steps = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    batches, micro_batches = [[], []], 0
    # Without --data all pairs are equal, and so are all steps.
    for step in range(min(steps, per_epoch) if len({id(pair) for pair in pairs}) > 1 else 1):
        chosen = [pairs[i] for i in data.indices_of_step(step, len(pairs), config.batch_size, config.seed)]
        lengths = [pair.tokens(share) for pair in chosen]
        plan = data.plan_micro_batches(lengths, ranks, config.tokens_per_micro_batch)
        micro_batches = max(micro_batches, len(plan))
        for number, of_ranks in enumerate(plan):
            for own in of_ranks:
                batch = [chosen[i] for i in own]
                which = 0 if number == 0 else 1
                if tokens_in(batch, config) > tokens_in(batches[which], config):
                    batches[which] = batch
    scores = 0
    for pair in pairs:
        prefix = len(pair.prefix)
        scores += prefix**2 // 2 * (1 if share else 2)
        scores += sum(prefix * len(span) + len(span)**2 // 2 for span in (pair.chosen, pair.rejected))
    return Work(steps, sum(pair.tokens(share) for pair in pairs),
                sum(len(pair.chosen) + len(pair.rejected) for pair in pairs), scores, micro_batches,
                [batch for batch in batches if batch])


def tokens_in(batch: list[Pair], config: stepdpo.Config) -> int:
    return sum(pair.tokens(config.share_prefix) for pair in batch)


def states_of(count: float, offload: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """(on a GPU, in host memory): name -> bytes that so many parameters take between steps, in fp32."""
    states = {"weights": 4 * count, "moments": 8 * count, "gradients": 4 * count}
    away = {None: (), "moments": ("moments",), "gradients": ("moments", "gradients"), "all": states}[offload]
    return ({name: size for name, size in states.items() if name not in away},
            {name: size for name, size in states.items() if name in away})


def predict(
    shape: Shape,
    layer: tuple[int, int],  # as `count_layer` counts it for these pairs
    pairs: list[Pair],       # of a micro-batch
    is_first: bool,          # micro-batch of its optimizer step: then its gradients come one by one
    ranks: int,
    config: stepdpo.Config,
    cuda: bool,
) -> dict[str, dict[str, float]]:
    """moment -> what a GPU holds then -> bytes; and "host" -> what a rank has in host memory."""
    s = config.shard_size or ranks
    b = getattr(torch, config.dtype).itemsize
    N, E, P = shape.all, shape.end, shape.layer
    kept_of_layer, in_backward = layer
    length = tokens_in(pairs, config)  # L
    trained = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)  # T
    ahead = b if s > 1 else 0  # a rank alone gathers nothing ahead: it copies a group when that runs

    on_gpu, on_host = states_of(N / s, config.offload)
    one = length * shape.hidden * b if config.activation_checkpointing else kept_of_layer
    recomputed = in_backward - (0 if config.activation_checkpointing else kept_of_layer)
    end = length * shape.hidden * (4 + b)  # the last norm keeps its input in fp32, and what it makes of it
    kept = {"kept for backward": shape.layers * one + end}
    width = min(kernels.BLOCK if cuda else kernels.BLOCK_CPU, E // shape.hidden)
    tiles = {"tiles of the loss": trained * (width * (4 + (b if cuda else 0)) + 2 * 4 * shape.hidden)}
    # torch 2.13's foreach_reduce has the group's last gradient in a loop variable, where there is a loop.
    of_group = E * b if s > 1 else 0
    reduced = 4 / s  # a group's shards, before they are added to those of other micro-batches
    tied = E if shape.tied else 0  # gathered and with a whole gradient, from the head to the embedding
    there = on_gpu.pop("gradients", 0)

    def always(to_come: int) -> dict[str, float]:
        """States, when a first micro-batch has still to make the gradients of so many parameters."""
        return {**on_gpu, "gradients": max(0, there - 4 * to_come / s) if is_first else there}

    def in_layer(before: int) -> dict[str, float]:
        """In the backward of a layer that has so many before it."""
        is_last = before == shape.layers - 1
        return {
            **always(before * P + P + E), "kept for backward": (before + 1) * one,
            "layer in backward": recomputed,
            "gathered layers": P * b + (P * ahead if before else 0),
            "embedding and head": tied * 2 * b or (0 if before else E * ahead),
            "reduce-scatter": 4 * P if not is_last else 0 if tied else 4 * E}

    moments = {
        "in the head's backward": {
            **always(N), **kept, **tiles, "embedding and head": 2 * E * b, "gathered layers": P * ahead},
        # What is kept goes as gradients come, so the most is at one end.
        "in the last layer's backward": in_layer(shape.layers - 1),
        "in the last but one layer's backward": in_layer(max(0, shape.layers - 2)),
        "in the second layer's backward": in_layer(min(1, shape.layers - 1)),
        "in the first layer's backward": in_layer(0),
        "in the embedding's backward": {
            **always(E), "reduce-scatter": 4 * P,
            # Autograd adds a tied weight's two gradients into a third tensor.
            "embedding and head": (4 if tied else 2) * E * b},
        "when the embedding's gradient is reduced": {
            **always(E), "embedding and head": of_group, "reduce-scatter": E * (4 + reduced)},
    }
    if not tied:
        moments["when the head's gradient is reduced"] = {
            **always(N), **kept, "embedding and head": of_group, "gathered layers": P * ahead,
            "reduce-scatter": E * (4 + reduced)}
    if on_host and cuda:
        _, visitors = states_of(2 * E / s, config.offload)
        moments["in the update"] = {**always(0), "visitors": sum(visitors.values())}
    return {**moments, "host": on_host}


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


class Plan(NamedTuple):
    """What is known of a run before it."""

    config: stepdpo.Config
    work: Work
    moments: dict[str, dict[str, float]]  # what a GPU holds, as `predict` gives it
    host: float                           # bytes of tensors that a rank has in host memory

    @property
    def peak(self) -> str:
        """The moment in which a GPU holds the most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def bytes(self) -> float:
        return sum(self.moments[self.peak].values())

    def fits(self, card: str) -> bool:
        return self.bytes * MARGIN + CONTEXT <= CARDS[card]


class Planner:
    """A model, pairs and ranks, for which plans with other flags are made; what they have in common, once."""

    def __init__(self, hf_config: transformers.PretrainedConfig, pairs: Sequence[Pair], ranks: int,
                 cuda: bool = True):
        self.hf_config, self.pairs, self.ranks, self.cuda = hf_config, pairs, ranks, cuda
        self.shape = shape_of(hf_config)
        self.layers: dict[tuple, tuple[int, int]] = {}

    def plan(self, config: stepdpo.Config) -> Plan:
        if self.ranks % (config.shard_size or 1):
            raise InputError(f"--shard-size {config.shard_size}: must divide --gpus {self.ranks}")
        config = startup.with_budget(config, self.pairs, self.cuda)
        work = work_of(self.pairs, self.ranks, config)
        plans = []
        for number, batch in enumerate(work.batches):
            lengths = [len(part) for pair in batch for part in pair[:3]]
            key = (config.dtype, config.share_prefix, *lengths)
            if key not in self.layers:
                self.layers[key] = count_layer(self.hf_config, batch, config, self.cuda)
            moments = predict(self.shape, self.layers[key], batch, number == 0, self.ranks, config, self.cuda)
            plans.append(Plan(config, work, moments, sum(moments.pop("host").values())))
        return max(plans, key=lambda plan: plan.bytes)


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
            plan = planner.plan(stepdpo.Config(**{**vars(config), **setting}))
            if plan.fits(card):
                return flags_of(setting), plan
    return None


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

    m, moved = work.micro_batches, 4 * shape.all / (config.shard_size or planner.ranks)
    up = {None: 0, "moments": 2, "gradients": 2 + m, "all": 2 * m + 4}[config.offload]
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
    print(f"one GPU     {plan.bytes / 1e9:.2f} GB at most, {plan.peak}:")
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
        words = f"with {advice[0] or 'the defaults'} {advice[1].bytes / 1e9:.2f} GB" if advice else (
            "too small with any flags: take more GPUs")
        print(f"{card:12}{'fits' if plan.fits(card) else 'does not fit'}; best: {words}")
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
            "--activation-checkpointing --tokens-per-micro-batch 512 --offload all")


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

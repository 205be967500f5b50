"""Step-DPO: preference optimization on pairs of single reasoning steps (Lai et al. 2024, arXiv:2406.18629).

Given a problem x, correct steps s_1..s_{k-1}, a correct next step s_win and a wrong one s_lose, eq. (2) is

    L = -E log sigmoid( beta * [ log( pi(s_win  | x, s_<k) / pi_ref(s_win  | x, s_<k) )
                               - log( pi(s_lose | x, s_<k) / pi_ref(s_lose | x, s_<k) ) ] )

where pi_ref is the model before training. Only the step is trained on; all before it is context.

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT              # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-7B-Instruct \\
        --data xinlai/Math-Step-DPO-10K --output-dir OUT

In reading order: the loss; the policy, a model that returns log-probabilities of steps; from pairs to
log-probabilities; the training; what comes before its first step; building, sharding, loading and exporting
the model; checkpoints; flags. data.py says what a pair is and how it becomes tokens, kernels.py why no logits
are ever held.
"""

import argparse
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from data import FLOAT, INT, POSITIVE_FLOAT, POSITIVE_INT, Batch, InputError, Pair, Segments, print0
from kernels import linear_logps

Config = argparse.Namespace  # the flags, by name

# --------------------------------------------------------------------------------------------------- the loss


def step_dpo_loss(
    policy_chosen_logps: Tensor,       # (B,) fp32, summed over the chosen step's tokens, nats
    policy_rejected_logps: Tensor,     # (B,)
    reference_chosen_logps: Tensor,    # (B,) of the model before training
    reference_rejected_logps: Tensor,  # (B,)
    beta: float,                       # > 0; strength of the pull towards the reference
) -> tuple[Tensor, Tensor, Tensor]:
    """Step-DPO loss, eq. (2) of arXiv:2406.18629.

    Returns (losses, chosen_rewards, rejected_rewards), each (B,); rewards are detached, in nats.
    Raises ValueError if shapes differ or beta <= 0.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if any(x.shape != logps[0].shape for x in logps):
        raise ValueError(f"the four logps must have one shape, got {[tuple(x.shape) for x in logps]}")
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")

    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)  # beta log( pi / pi_ref )
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # eq. (2)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ------------------------------------------------------------------------------------------------- the policy


class Head(nn.Module):
    """The language-model head. Asked with targets it returns their log-probabilities, and no logits exist."""

    def __init__(self, weight: nn.Parameter):  # (V, D)
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight)  # (..., V)
        return linear_logps(hidden, self.weight, targets)  # (T,)


class Policy(nn.Module):
    """A causal language model that maps a packed batch to the log-probabilities of its trained tokens."""

    def __init__(self, model: nn.Module):
        super().__init__()
        refuse_unsupported(model)
        model.set_output_embeddings(Head(model.get_output_embeddings().weight))
        self.model, self.name = model, type(model).__name__

    def forward(self, batch: Batch) -> Tensor:
        """(T,) fp32: log-probabilities of the trained tokens, in nats."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            segments=batch.segments,  # travels through the layers to `segment_attention`
        ).last_hidden_state  # (1, L, D)

        # Only the places that predict a trained token reach the head. It is called as a module, because FSDP
        # gathers a module's weight for the time of its forward.
        return self.model.get_output_embeddings()(hidden[0, batch.predict_at], batch.targets)

    def plain_token_logps(self, ids: Tensor, trained: int) -> Tensor:
        """(trained,) fp32: of the last tokens of one sequence (L,), by nothing of ours: the model's own
        forward and logits, and the library's attention."""
        self.model.set_attn_implementation("sdpa")
        try:
            logits = self.model(ids[None], use_cache=False, logits_to_keep=trained + 1).logits[0, :-1]
        finally:
            self.model.set_attn_implementation("segments")
        return logits.float().log_softmax(-1).gather(1, ids[-trained:, None])[:, 0]


def refuse_unsupported(model: nn.Module) -> None:
    """Raise InputError for a model that would be trained as something else than it computes."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        raise InputError(f"{name} carries state from token to token, which packed rows would mix up: "
                         "it is not supported")

    for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logits_scaling",
                "logit_scale", "lm_head_multiplier"):
        if getattr(config, key, None) not in (None, 1):
            raise InputError(f"{name} changes its logits ({key} = {getattr(config, key)}), which is not "
                             "supported: what was trained would not be what the model computes")

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise InputError(f"{name}: the head must be a linear layer without bias, got {head}")


@torch.compiler.disable  # segments have other lengths in every row, and each would be compiled anew
def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, d)
    key: Tensor,    # (1, H', L, d), where H is a multiple of H'
    value: Tensor,
    attention_mask: None = None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,  # a token sees so many tokens, itself included; None: all before it
    **others: Any,
) -> tuple[Tensor, None]:  # (1, L, H, d)
    """Attention of a packed row: causal in each segment, whose keys are its prefix's and then its own.

    The n queries of a segment are the last n of its m keys' tokens, so this is plain causal attention aligned
    at the lower right. No mask of the row is made: one would cost what it hides.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise InputError(f"{type(module).__name__} attends with {name}, which is not supported: only "
                             "causal attention and sliding windows are")

    key = key.index_select(2, segments.key_index)  # (1, H', K, d)
    value = value.index_select(2, segments.key_index)
    if query.is_cuda and query.dtype != torch.float32:  # FlashAttention takes 16 bits only
        return flash_attention(query, key, value, segments, scaling, sliding_window), None

    # Elsewhere segment by segment: their lengths differ, and sdpa computes what a mask hides.
    outputs = []
    for q, k, v in zip(query.split(segments.query_lengths, 2), key.split(segments.key_lengths, 2),
                       value.split(segments.key_lengths, 2), strict=True):
        n, m = q.shape[2], k.shape[2]
        mask = None  # if it is square: sdpa's is_causal is aligned at the upper left
        if n < m or (sliding_window is not None and sliding_window < m):
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            if sliding_window is not None:
                mask = mask.triu(m - n - sliding_window + 1)
        outputs.append(F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2), None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None,
                    sliding_window: int | None) -> Tensor:
    """The same in one call: query (1, H, L, d), key and value gathered, (1, H', K, d) -> (1, L, H, d)."""
    from torch.nn.attention.varlen import varlen_attn
    # FlashAttention shares key heads by itself. torch 2.11 has no argument for it, and no check of heads.
    options = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}
    return varlen_attn(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        segments.query_offsets, segments.key_offsets, max(segments.query_lengths), max(segments.key_lengths),
        scale=scaling, window_size=(-1 if sliding_window is None else sliding_window - 1, 0), **options)[None]


transformers.AttentionInterface.register("segments", segment_attention)
transformers.AttentionMaskInterface.register("segments", lambda *args, **kwargs: None)


# --------------------------------------------------------------------------- from pairs to log-probabilities


def micro_batches(pairs: Sequence[Pair], indices: Sequence[int], config: Config,
                  desc: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of one global batch, with their pairs' indices: as many as on other ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [pairs[i].tokens(config.share_prefix) for i in indices]
    plan = data.split(lengths, ranks, config.tokens_per_micro_batch)

    for shares in tqdm(plan, desc=desc, unit="batch", disable=desc is None or rank != 0, leave=False):
        here = [int(indices[j]) for j in shares[rank]]
        yield here, data.pack([pairs[i] for i in here], config.share_prefix).to(local_device())


def step_logps(token_logps: Tensor, batch: Batch) -> Tensor:
    """Sum (T,) token log-probabilities by step: (2, B), chosen and rejected."""
    return token_logps.new_zeros(2 * batch.pairs).index_add(0, batch.sequence, token_logps).view(2, -1)


@torch.no_grad()
def all_logps(policy: Policy, pairs: Sequence[Pair], config: Config, desc: str) -> Tensor:
    """(2, N) fp32 on every rank: log-probabilities of the chosen and rejected steps of all pairs, in nats."""
    logps = torch.zeros(2, len(pairs), device=local_device())
    for here, batch in micro_batches(pairs, range(len(pairs)), config, desc):
        logps[:, here] = step_logps(policy(batch), batch)
    dist.all_reduce(logps)  # each pair was filled in by one rank
    return logps


# ----------------------------------------------------------------------------------------------- the training


def train_step(
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    indices: Sequence[int],  # of the pairs of this global batch
    reference: Tensor,       # (2, N) log-probabilities of all pairs under the reference
    config: Config,
) -> dict[str, float]:
    """One optimizer step. Returns its metrics, averaged over the global batch. Collective.

    Raises InputError, and leaves the model as it was, if the loss or the gradient is not finite.
    """
    began = time.perf_counter()
    # Sums stay on the device: a number asked for in between would wait for it.
    zero = partial(torch.zeros, (), dtype=torch.float64, device=local_device())
    sums: dict[str, Tensor] = defaultdict(zero)

    for here, batch in micro_batches(pairs, indices, config):
        chosen, rejected = step_logps(policy(batch), batch)
        reference_chosen, reference_rejected = reference[:, here]
        losses, chosen_rewards, rejected_rewards = step_dpo_loss(
            chosen, rejected, reference_chosen, reference_rejected, config.beta)

        # The mean over the global batch, however many ranks and micro-batches it is cut into. FSDP averages
        # gradients over the ranks, and what is wanted is their sum.
        loss = losses.sum() / len(indices)
        (loss * dist.get_world_size()).backward()

        for name, value in metric_sums(losses, chosen_rewards, rejected_rewards, chosen, rejected).items():
            sums[name] += value
        sums["tokens"] += batch.input_ids.numel()

    totals = sum_over_ranks(sums)
    tokens = totals.pop("tokens")
    metrics = {name: total / len(indices) for name, total in totals.items()}
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)  # sharded, as they are
    norm = norm.full_tensor().item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        some = ", ".join(pairs[i].where for i in indices[:5])
        raise InputError(f"step {step}: loss {metrics['loss']}, gradient norm {norm}; nothing was updated. "
                         f"Try a lower --learning-rate; the pairs: {some} ...")

    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    metrics |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens / seconds, "pairs_per_second": len(indices) / seconds}
    if local_device().type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def metric_sums(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor,
                rejected_logps: Tensor) -> dict[str, Tensor]:
    """Sums over (B,) pairs in fp64, under the names that TRL uses, so that plots overlay."""
    per_pair = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return {name: values.detach().double().sum() for name, values in per_pair.items()}


def sum_over_ranks(sums: dict[str, Tensor]) -> dict[str, float]:
    """All sums in one message, and in one copy from the device."""
    stacked = torch.stack(list(sums.values()))
    dist.all_reduce(stacked)
    return dict(zip(sums, stacked.tolist(), strict=True))


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then cosine to 0. Unlike in Hugging Face's schedule the first step's rate is not 0."""
    warmup = math.ceil(config.warmup_ratio * steps - 1e-9)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def evaluate(step: int, policy: Policy, held_out: Sequence[Pair], reference: Tensor, config: Config) -> None:
    """Log and print the metrics of the held-out pairs, if there are any (figure 2 of the paper)."""
    if not held_out:
        return
    chosen, rejected = all_logps(policy, held_out, config, "evaluating")
    losses, chosen_rewards, rejected_rewards = step_dpo_loss(chosen, rejected, *reference, config.beta)
    sums = metric_sums(losses, chosen_rewards, rejected_rewards, chosen, rejected)
    means = {name: total.item() / len(held_out) for name, total in sums.items()}
    log(config, {"step": step, **{f"eval/{name}": mean for name, mean in means.items()}})

    # Before the first step policy and reference are the same, so that no reward is the larger one.
    undefined = step == 0 and not config.reference
    accuracy = "-" if undefined else f"{means['rewards/accuracies']:.1%}"
    print0(f"step {step:4d}   held-out loss {means['loss']:.4f}, margin {means['rewards/margins']:+.4f}, "
           f"accuracy {accuracy}")


def train(config: Config) -> None:
    """The whole run: read, self-check, reference pass, optimizer steps, export. Collective."""
    start_processes()
    if is_finished(config):
        return

    # What is trained on, and in which order.
    folder = resolve(config.model)
    tokenizer = data.read_tokenizer(folder)
    pairs = read_pairs("training", config.data, tokenizer, config)
    held_out = read_pairs("held-out", config.eval_data, tokenizer, config)
    config = fill_defaults(config, pairs + held_out)
    plan = data.schedule(len(pairs), config.batch_size, config.epochs, config.seed)
    plan = plan[:config.max_steps or len(plan)]

    # The policy before training is the reference: what it says of each pair is computed once.
    policy, reference, held_out_reference = reference_pass(folder, pairs, held_out, plan, tokenizer, config)
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    first = start_or_resume(policy, optimizer, folder, pairs, plan, config)
    stop_asked = notice_sigterm()

    began, quiet = time.perf_counter(), dist.get_rank() > 0
    with tqdm(total=len(plan), initial=first, desc="training", unit="step", disable=quiet) as bar:
        for step in range(first, len(plan)):
            if step % config.eval_every == 0:
                evaluate(step, policy, held_out, held_out_reference, config)
            optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan), config)
            metrics = train_step(step, policy, optimizer, pairs, plan[step], reference, config)
            log(config, {"step": step, **metrics})
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.4f}, "
                                f"{metrics['pairs_per_second']:.1f} pairs/s", refresh=False)
            bar.update()
            save_if_due(policy, optimizer, step + 1, len(plan), stop_asked, config)

    # Exported before it is evaluated: the weights are what must not be lost.
    export(policy, folder, os.path.join(config.output_dir, "model"))
    evaluate(len(plan), policy, held_out, held_out_reference, config)
    minutes, seen = (time.perf_counter() - began) / 60, sum(len(indices) for indices in plan[first:])
    print0(f"finished    {len(plan) - first} optimizer steps, {seen:,} pairs in {minutes:.1f} min",
           f"            metrics in {config.output_dir}/metrics.jsonl, model in {config.output_dir}/model")


# ---------------------------------------------------------------------------- before the first optimizer step


def read_pairs(name: str, source: str | None, tokenizer: Any, config: Config) -> list[Pair]:
    """The pairs in a file, none if there is no file. Says how many are too long."""
    if not source:
        return []
    pairs, dropped = data.encode(data.read_rows(source), tokenizer, config.template, config.instruction,
                                 config.span, config.max_length)
    hint = f"; raise that to keep them (first: {', '.join(dropped[:3])})" if dropped else ""
    print0(f"{name:11s} {len(pairs):,} pairs, {len(dropped):,} dropped as longer than --max-length "
           f"{config.max_length}{hint}")
    return pairs


def fill_defaults(config: Config, pairs: list[Pair]) -> Config:
    """With the defaults that depend on the device. Raises InputError if a pair exceeds the micro-batch."""
    cuda = local_device().type == "cuda"
    longest = max(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    needed = longest.tokens(config.share_prefix)

    config = Config(**vars(config))
    config.dtype = config.dtype or ("bfloat16" if cuda else "float32")
    config.tokens_per_micro_batch = config.tokens_per_micro_batch or max(needed, 4096 if cuda else 1024)
    if config.activation_checkpointing is None:
        config.activation_checkpointing = cuda
    if needed > config.tokens_per_micro_batch:
        raise InputError(f"{longest.where}: takes {needed} tokens, more than --tokens-per-micro-batch "
                         f"{config.tokens_per_micro_batch}; raise that or lower --max-length")
    return config


def reference_pass(folder: str, pairs: list[Pair], held_out: list[Pair], plan: list, tokenizer: Any,
                   config: Config) -> tuple[Policy, Tensor, Tensor]:
    """The policy, checked, and the reference log-probabilities of training and held-out pairs, (2, N) each.

    The reference is the model before training, so the policy itself computes them; nothing else is kept of
    it. With --reference another model does, which is then put away.
    """
    reference_folder = resolve(config.reference) if config.reference else folder
    if config.reference and data.read_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--reference {config.reference}: its vocabulary is not that of {config.model}")

    policy = build(reference_folder, config)
    # An embedding's index out of range is a device assert on CUDA, and no message.
    embeddings = policy.model.get_input_embeddings().num_embeddings
    for pair in pairs + held_out:
        largest = max(pair.prefix + pair.chosen + pair.rejected)
        if largest >= embeddings:
            raise InputError(f"{pair.where}: has token {largest}, but {config.model} has {embeddings} "
                             "embeddings; its tokenizer belongs to another model")

    describe(policy, pairs, plan, tokenizer, config)
    self_check(policy, pairs, config)
    reference = reference_logps(policy, reference_folder, "training", pairs, config)
    held_out_reference = reference_logps(policy, reference_folder, "held-out", held_out, config)

    if config.reference:
        del policy
        gc.collect()  # sharded layers stand in reference cycles, and two models may not fit
        policy = build(folder, config)
        self_check(policy, pairs, config)
    return policy, reference, held_out_reference


def describe(policy: Policy, pairs: list[Pair], plan: list, tokenizer: Any, config: Config) -> None:
    """Say what will happen, so that a wrong template is seen before hours are spent."""
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    prefix, chosen, rejected = (sum(len(pair[i]) for pair in pairs) / len(pairs) for i in range(3))
    saved = prefix / (2 * prefix + chosen + rejected)
    saves = "saves" if config.share_prefix else "would save"
    print0(f"model       {config.model}: {policy.name}, {parameters / 1e6:,.1f}M parameters",
           f"processes   {dist.get_world_size()} x {device_name()}, compute in {config.dtype}, "
           "master weights in float32",
           f"lengths     prefix {prefix:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} tokens on "
           f"average; sharing the prefix {saves} {saved:.0%} of all tokens",
           f"steps       {len(plan)} optimizer steps of about {len(plan[0])} pairs, "
           f"{config.tokens_per_micro_batch} tokens per micro-batch",
           f"example     {pairs[0].where}, the trained tokens in [[...]]:",
           *(f"    | {line}" for line in data.marked_text(pairs[0], tokenizer).splitlines()))


@torch.no_grad()
def self_check(policy: Policy, pairs: Sequence[Pair], config: Config) -> None:
    """Packed log-probabilities of two pairs against the model's own on their four plain sequences.

    Attention that ignores the segments would otherwise be silent. Raises InputError if the mean difference
    of one of the four is more than rounding, in nats per token.
    """
    by_length = sorted(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    sample = [by_length[-1], by_length[0]]  # the longest meets every window; two show that pairs are separate
    packed = policy(data.pack(sample, config.share_prefix).to(local_device()))  # (T,)

    differences = []
    for pair in sample:
        for step in (pair.chosen, pair.rejected):
            ours, packed = packed[:len(step)], packed[len(step):]
            sequence = torch.tensor(pair.prefix + step, device=local_device())
            plain = policy.plain_token_logps(sequence, len(step))
            differences.append((ours - plain).abs().mean())
    worst = torch.stack(differences).max().item()  # NaN if one is

    allowed = 1e-3 if config.dtype == "float32" else 0.1  # bf16 logits alone are off by 0.02-0.04
    if not worst <= allowed:
        remedy = "use --no-share-prefix" if config.share_prefix else "this model cannot be trained here"
        raise InputError(f"{policy.name}: packed log-probabilities differ from plain ones by {worst:.2g} "
                         f"nats per token (allowed: {allowed:g}), so its attention does not keep to the "
                         f"segments of a packed row; {remedy}")
    print0(f"self-check  packed and plain log-probabilities differ by {worst:.1e} nats per token")


def reference_logps(policy: Policy, folder: str, name: str, pairs: Sequence[Pair], config: Config) -> Tensor:
    """(2, N) log-probabilities under the reference, computed as the policy's are, or from the cache.

    The cache ($STEPDPO_CACHE, by default ~/.cache/stepdpo) is keyed by a hash of the model's files, the token
    ids (so of data, template, span and tokenizer) and what changes the arithmetic.
    """
    if not pairs:
        return torch.empty(2, 0)
    files = sorted(set(weight_files(folder).values()))
    # The identity samples large tensors. A model retrained in place could slip through, but for its time.
    written = [os.stat(os.path.join(folder, file)).st_mtime_ns for file in files]
    key = data.content_key(
        data.model_identity(folder), str(written), data.fingerprint(pairs), config.dtype,
        str(config.share_prefix), local_device().type, torch.__version__, transformers.__version__)
    cache = os.environ.get("STEPDPO_CACHE") or os.path.expanduser("~/.cache/stepdpo")
    path = os.path.join(cache, f"{key}.safetensors")

    is_reader = dist.get_rank() == 0  # rank 0 alone reads and writes: other nodes may have other disks
    found = [load_file(path)["logps"] if is_reader and os.path.exists(path) else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        print0(f"reference   log-probabilities of {name} pairs read from {path}")
        return found[0].to(local_device())

    logps = all_logps(policy, pairs, config, f"reference ({name})")
    if is_reader:
        os.makedirs(cache, exist_ok=True)
        save_file({"logps": logps.cpu()}, f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    print0(f"reference   log-probabilities of {name} pairs computed, kept in {path}")
    return logps


# --------------------------------------------------------------------- building, sharding, loading, exporting


def resolve(name: str) -> str:
    """A local folder, or the hub model of that name brought to this machine."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            snapshot_download(name, allow_patterns=wanted)
        dist.barrier()
        return snapshot_download(name, allow_patterns=wanted, local_files_only=True)
    except Exception as error:  # the hub's client has a large family of errors of its own
        raise InputError(f"{name}: no such folder, and not to be had from the hub ({error})") from None


@contextmanager
def reading(folder: str) -> Iterator[None]:
    """Turns what the libraries say about a bad model folder into an error that names the folder."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder}: {error}") from None


def build(folder: str, config: Config) -> Policy:
    """The model in a folder, sharded over all ranks, in eval mode: training has no dropout either.

    It is built on the meta device, where parameters take no memory, then sharded, and only then do the shards
    get memory and numbers: no rank ever holds the whole model.
    """
    with reading(folder), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32,
            attn_implementation="segments")
    policy = Policy(model).eval()
    compute_buffers(model)
    shard(policy, config)
    with reading(folder):
        load(policy, folder)
    return policy


def compute_buffers(model: nn.Module) -> None:
    """Give rotary frequencies and the like, which stand in no checkpoint, their numbers.

    The model's own initialisation computes them. Raises InputError for one that it leaves as it was.
    """
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=local_device())
        if names:
            model._init_weights(module)  # as from_pretrained does; its parameters are still on meta

        for name in module._non_persistent_buffers_set.intersection(names):
            if module._buffers[name]._version == 0:  # nothing was written into it
                raise InputError(f"{type(model).__name__} is not supported: its buffer {path}.{name} is in "
                                 "no checkpoint, and the model's initialisation does not compute it")


def shard(policy: Policy, config: Config) -> None:
    """FSDP2: each decoder layer is gathered while it runs; untied embedding and head too; then the rest."""
    model, device = policy.model, local_device()
    layers = [module for module in model.modules()
              if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(f"{policy.name} does not name its decoder layers (_no_split_modules): "
                         "it cannot be sharded")

    offload = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    wrap = partial(
        fsdp.fully_shard,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=fsdp.MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32),
        offload_policy=offload if config.offload else fsdp.OffloadPolicy(),
    )
    for layer in layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward)  # inside the checkpoint: outside it has no effect
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        wrap(layer)
    # A weight that two modules share must be in the group of a module above both.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if not tied:
        wrap(embedding)
        wrap(head)
    wrap(policy, reshard_after_forward=True)  # else passes without gradients leave gathered parameters behind
    fsdp.register_fsdp_forward_method(policy, "plain_token_logps")

    # Memory for the shards. Not `to_empty`, which would empty the buffers too.
    home = torch.device("cpu") if config.offload else device
    policy._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    if tied:
        head.weight = embedding.weight  # _apply has made two of one


def weight_files(folder: str) -> dict[str, str]:
    """Tensor name -> the safetensors file that holds it, as a path inside the model folder."""
    single, index = f"{folder}/model.safetensors", f"{folder}/model.safetensors.index.json"
    if os.path.exists(index):
        files = data.parse_json(index, data.read_bytes(index))["weight_map"]
        for file in set(files.values()):
            if os.path.isabs(file) or os.pardir in file.split("/"):
                raise InputError(f"{index}: {file!r} must be a file inside that folder")
        return files
    if not os.path.exists(single):
        raise InputError(f"{folder}: has no model.safetensors(.index.json); "
                         "only safetensors weights are loaded")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


@torch.no_grad()
def load(policy: Policy, folder: str) -> None:
    """Fill the shards: each rank reads only its own rows of each tensor, and opens each file once.

    Raises InputError if the tensors in the folder are not, one to one, those of the model.
    """
    files, tensors = weight_files(folder), policy.model.state_dict(keep_vars=True)
    filled = {tensor for name, tensor in tensors.items() if name in files}  # tied: stored once or twice
    missing = [name for name, tensor in tensors.items() if tensor not in filled]
    unknown = [name for name in files if name not in tensors and not name.endswith("inv_freq")]  # recomputed
    if missing or unknown:
        raise InputError(f"{folder}: its tensors are not one to one those of {policy.name}, which is not "
                         f"supported (missing: {missing[:3]}, left over: {unknown[:3]})")

    names = sorted(tensors.keys() & files.keys(), key=lambda name: (files[name], name))
    bar = tqdm(names, desc="loading", unit="tensor", disable=dist.get_rank() > 0, leave=False)
    for path, names_in_file in itertools.groupby(bar, key=files.get):
        with safe_open(os.path.join(folder, path), "pt") as file:
            for name in names_in_file:
                tensor, stored = tensors[name], file.get_slice(name)
                if stored.get_shape() != list(tensor.shape):
                    raise InputError(f"{folder}/{path}: {name} must be {[*tensor.shape]}, "
                                     f"got {stored.get_shape()}")
                if isinstance(tensor, DTensor):
                    rows = math.ceil(len(tensor) / dist.get_world_size())  # FSDP cuts rows like torch.chunk
                    start = min(dist.get_rank() * rows, len(tensor))
                    tensor.to_local().copy_(stored[start:start + rows])
                else:
                    tensor.copy_(stored[...])


@torch.no_grad()
def export(policy: Policy, source: str, folder: str) -> None:
    """Write the folder `source` again with the trained numbers in it: same files, names and dtypes, so
    whatever loads one loads the other. Complete or absent, never half."""
    files, tensors = weight_files(source), policy.model.state_dict()
    is_writer, unfinished = dist.get_rank() == 0, folder + ".tmp"
    if is_writer:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        for name in os.listdir(source):  # configuration, tokenizer, chat template: byte for byte
            if name.endswith((".json", ".jinja", ".txt", ".model")):
                shutil.copy(os.path.join(source, name), unfinished)

    paths = sorted(set(files.values()))
    for path in tqdm(paths, desc="exporting", unit="file", disable=not is_writer, leave=False):
        trained = {}
        with safe_open(os.path.join(source, path), "pt") as before:
            for name in sorted(name for name in files if files[name] == path):
                if name not in tensors:
                    trained[name] = before.get_tensor(name)
                    continue
                # Gathered by all ranks together; only one keeps it.
                whole = tensors[name].full_tensor() if isinstance(tensors[name], DTensor) else tensors[name]
                if is_writer:
                    trained[name] = whole.to("cpu", before.get_slice(name)[:0].dtype, copy=True)
        if is_writer:
            target = os.path.join(unfinished, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            save_file(trained, target, metadata={"format": "pt"})
            shutil.copymode(os.path.join(source, path), target)  # safetensors lets only the owner read

    if is_writer:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    dist.barrier()


# -------------------------------------------------------------------------------------- checkpoints and files


def is_finished(config: Config) -> bool:
    """Whether --resume finds the run already done. Raises InputError if a run would be overwritten."""
    out = config.output_dir
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"--output-dir {out}: is not a folder")
    if os.path.exists(os.path.join(out, "metrics.jsonl")) and not config.resume:
        raise InputError(f"{out}: already holds a run; continue it with --resume "
                         "or choose another --output-dir")
    finished = config.resume and os.path.isdir(os.path.join(out, "model"))
    if finished:
        print0(f"finished    already: {os.path.join(out, 'model')}")
    return finished


def start_or_resume(policy: Policy, optimizer: torch.optim.Optimizer, folder: str, pairs: list[Pair],
                    plan: list, config: Config) -> int:
    """Load the checkpoint with --resume, and write run.json. Returns the optimizer steps already done."""
    identity = {"config": vars(config), "pairs": data.fingerprint(pairs),
                "weights": data.model_identity(folder)}
    first = resume(policy, optimizer, identity, config.output_dir) if config.resume else 0
    if dist.get_rank() == 0:
        packages = ("torch", "triton", "transformers", "safetensors", "numpy")
        record = {**identity, "optimizer_steps": len(plan), "processes": dist.get_world_size(),
                  "device": device_name(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "versions": {package: version(package) for package in packages}}
        os.makedirs(config.output_dir, exist_ok=True)
        data.write_atomically(f"{config.output_dir}/run.json", json.dumps(record, indent=2) + "\n")
    return first


def resume(policy: Policy, optimizer: torch.optim.Optimizer, identity: dict[str, Any], out: str) -> int:
    """Load the newest checkpoint and forget the metrics after it. Returns the optimizer steps it has seen.

    Raises InputError if there is none, or if a flag or the data that the result depends on has changed.
    """
    folder = os.path.join(out, "checkpoints")
    present = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(name for name in present if re.fullmatch(r"step-\d+", name))
    if not names:
        raise InputError(f"--resume: no checkpoint in {folder}; "
                         "start without --resume in another --output-dir")
    refuse_changes(identity, out)

    # Loaded into the very tensors, sharded as they are now: any number of ranks may go on.
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=os.path.join(folder, names[-1]))
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step = int(names[-1].removeprefix("step-"))
    if dist.get_rank() == 0:
        with open(f"{out}/metrics.jsonl") as file:
            complete = [line for line in file if line.endswith("\n")]  # kill -9 may have torn the last one
        kept = [line for line in complete if json.loads(line)["step"] < step]
        data.write_atomically(f"{out}/metrics.jsonl", "".join(kept))
    print0(f"resuming    after optimizer step {step}")
    return step


def refuse_changes(identity: dict[str, Any], out: str) -> None:
    """Raise InputError if the run in folder `out` was started with other flags, data or model."""
    free = ("resume", "output_dir", "test_problems", "tokens_per_micro_batch", "eval_every", "save_every",
            "share_prefix", "activation_checkpointing", "offload", "compile")  # the result stays the same
    with open(f"{out}/run.json") as file:
        before = json.load(file)
    changed = []
    for name, value in identity["config"].items():
        was = before["config"].get(name)
        if name not in free and was != value:
            changed.append(f"--{name.replace('_', '-')} {was} -> {value}")
    for name, flag in (("pairs", "data"), ("weights", "model")):
        if before[name] != identity[name]:
            changed.append(f"content of --{flag}")
    if changed:
        raise InputError(f"--resume: {out} was started with another {', '.join(changed)}")


def save_if_due(policy: Policy, optimizer: torch.optim.Optimizer, done: int, steps: int, stop_asked: list,
                config: Config) -> None:
    """Save every --save-every optimizer steps, and if any rank was asked to stop; that ends the run here."""
    # The signal may reach the ranks between different steps, but all must save the same one.
    asked = torch.tensor(len(stop_asked), device=local_device())
    dist.all_reduce(asked)
    is_last = done == steps
    stopping = asked.item() > 0 and not is_last

    # The last step is saved too, because the export may find the disk full.
    due = config.save_every and (is_last or done % config.save_every == 0)
    if due or stopping:
        save(policy, optimizer, os.path.join(config.output_dir, "checkpoints"), done)
    if stopping:
        print0(f"stopped     after optimizer step {done} of {steps}; "
               "the same command with --resume continues")
        sys.exit(128 + signal.SIGTERM)


def save(policy: Policy, optimizer: torch.optim.Optimizer, folder: str, step: int) -> None:
    """A sharded checkpoint, complete or absent; those before are removed after it."""
    # Written under another name first: what is called step-N is complete.
    older = os.listdir(folder) if os.path.isdir(folder) else []
    path = os.path.join(folder, f"step-{step:06d}")
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path + ".tmp")
    if dist.get_rank() == 0:
        os.rename(path + ".tmp", path)
        for name in older:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # PATH.tmp of a killed run is gone
    dist.barrier()


def log(config: Config, line: dict[str, float]) -> None:
    if dist.get_rank() == 0:
        with open(os.path.join(config.output_dir, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------- processes and flags


def start_processes() -> None:
    """Join the process group that torchrun describes, or be a group of one."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here "
                         "(CUDA_VISIBLE_DEVICES= hides them and trains on the CPU)")
    if cuda:
        torch.cuda.set_device(local_rank)
    # gloo too on CUDA: with --offload the gradients, whose norm is needed, are in CPU memory.
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)


def local_device() -> torch.device:
    """Of this rank, as `start_processes` has set it."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if local_device().type == "cuda" else "CPU"


def notice_sigterm() -> list:
    """A list that is no longer empty once SIGTERM came, as it does to a job that is preempted."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


def parse(argv: Sequence[str] | None = None) -> Config:
    """The flags. The defaults are the paper's, where the paper has the thing."""
    parser = data.Parser("stepdpo.py", description=__doc__, epilog=(
        "@FILE reads flags from FILE, written as on the command line; # starts a comment."))
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what is trained on what").add_argument
    add("--model", required=True, help="model to train: a Hugging Face folder with safetensors, or hub name")
    add("--data", required=True, help="step pairs to train on: .jsonl, .json, .parquet or a hub dataset")
    add("--output-dir", required=True, help="folder for metrics.jsonl, run.json, checkpoints/, model/")
    add("--reference", help="reference model [the model itself before training]")
    add("--span", choices=data.SPANS, default="step", help="one step, or whole solutions: plain DPO [step]")
    add("--template", choices=data.TEMPLATES, default="chat", help="around problem and answer [chat]")
    add("--instruction", help="text after the problem in the user turn, '' for none [the template's own: "
                              f"{data.INSTRUCTION!r}, but nothing for alpaca]")
    add("--max-length", type=POSITIVE_INT, default=1024, help="tokens of prefix + step; longer pairs are "
        "dropped and counted, never cut [1024]")

    add = parser.add_argument_group("the method").add_argument
    add("--beta", type=POSITIVE_FLOAT, default=0.4,
        help="strength of the pull towards the reference; paper: 0.4, and 0.5 for 72B [0.4]")
    add("--learning-rate", type=POSITIVE_FLOAT, default=5e-7, help="at its peak; then cosine to 0 [5e-7]")
    add("--warmup-ratio", type=FLOAT, default=0.1, help="share of optimizer steps in which it rises [0.1]")
    add("--batch-size", type=POSITIVE_INT, default=128,
        help="pairs per optimizer step over all ranks, about: epochs are cut evenly [128]")
    add("--epochs", type=POSITIVE_INT, default=8, help="passes over the pairs; paper: 8, above 30B 4 [8]")
    add("--max-steps", type=INT, default=0, help="end the schedule after so many optimizer steps [0: not]")
    add("--max-grad-norm", type=POSITIVE_FLOAT, default=1.0, help="clip the gradient to this norm [1.0]")
    add("--seed", type=INT, default=0, help="of the order of the pairs [0]")

    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval-data", help="held-out step pairs: the same metrics, no training")
    add("--eval-every", type=POSITIVE_INT, default=50,
        help="optimizer steps between evaluations; there is always one before and one after [50]")
    add("--test-problems", help="held-out problems with answers: at the end, greedy accuracy before and "
        "after, in answers of at most --max-length tokens; each process holds a whole model for it")
    add("--save-every", type=INT, default=0,
        help="optimizer steps between checkpoints [0: only when stopped by SIGTERM]")
    add("--resume", action=switch, default=False, help="continue from the checkpoint in --output-dir")

    add = parser.add_argument_group("memory and speed: the result stays the same").add_argument
    add("--tokens-per-micro-batch", type=POSITIVE_INT,
        help="tokens in one forward and backward of a rank [4096 on CUDA, 1024 on CPU]")
    add("--share-prefix", action=switch, default=True, help="lay out once what chosen and rejected share")
    add("--activation-checkpointing", action=switch,
        help="keep only each layer's input: less memory, 1/3 more work [on CUDA, not on CPU]")
    add("--offload", action=switch, default=False, help="parameters, gradients, optimizer in CPU memory")
    add("--compile", action=switch, default=False, help="torch.compile each decoder layer")
    add("--dtype", choices=("bfloat16", "float32"),
        help="compute type; master weights are float32 [bfloat16 on CUDA, else float32]")
    return parser.parse_args(argv)


def main() -> None:
    config = parse()
    try:
        if config.test_problems:
            from pairs.problems import read_problems
            read_problems(config.test_problems)  # what is wrong with them must not show only at the end
        train(config)
        if config.test_problems:
            from pairs.stages import report_gain
            gc.collect()  # the trained model stands in reference cycles
            report_gain(resolve(config.model), f"{config.output_dir}/model", config)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each node: they may have different files
            print(f"stepdpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

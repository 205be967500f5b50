"""Step-DPO: preference optimization on pairs of single reasoning steps (Lai et al. 2024, arXiv:2406.18629).

Given a problem x, correct steps s_1..s_{k-1}, a correct next step s_win and a wrong one s_lose, eq. (2) is

    L = -E log sigmoid( beta * [ log( pi(s_win  | x, s_<k) / pi_ref(s_win  | x, s_<k) )
                               - log( pi(s_lose | x, s_<k) / pi_ref(s_lose | x, s_<k) ) ] )

where pi_ref is the model before training. Only the step is trained on; all before it is context.

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT              # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-7B-Instruct \\
        --data xinlai/Math-Step-DPO-10K --output-dir OUT

In reading order: the loss; the policy, a model that returns log-probabilities of steps; from pairs to
log-probabilities; the training; what comes before its first step; building and sharding the model; the
output folder; flags. data.py says what a pair is and how it becomes tokens, attention.py how packed pairs do
not see each other, kernels.py why no logits are ever held, offload.py how 72B parameters fit, storage.py how
they get from a disk into shards and back, runs.py how nothing of a run is lost.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import files
import models
import runs
import storage
from attention import current_row
from data import Batch, Pair
from files import INT, POSITIVE_FLOAT, POSITIVE_INT, SHARE, TEXT, InputError, print0, progress, refuse_model
from kernels import linear_logps
from offload import OFFLOADS, HostAdamW, clip_grad_norm_

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

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (V, D), (V,) or None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)  # (..., V)
        if self.bias is None:
            return linear_logps(hidden, self.weight, targets)  # (T,)
        # A bias is a column more of the weight, whose input is 1; with seven of zeros, to keep D aligned.
        bias = F.pad(self.bias[:, None], (0, 7))
        return linear_logps(F.pad(hidden, (0, 8), value=1.0), torch.cat([self.weight, bias], 1), targets)


class Policy(nn.Module):
    """A causal language model that maps a packed batch to the log-probabilities of its steps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        models.refuse_unsupported(model)
        self.scale = models.logit_scale(model)
        model.set_output_embeddings(Head(model.get_output_embeddings()))
        self.model = model
        self.name = type(model).__name__

    def forward(self, batch: Batch) -> Tensor:
        """(2, B) fp32: log-probabilities of the chosen and of the rejected steps, in nats."""
        current_row.name, current_row.segments, current_row.calls = self.name, batch.segments, 0
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
        ).last_hidden_state  # (1, L, D)
        if current_row.calls == 0:
            refuse_model(self.name, models.OWN_ATTENTION)

        # Only the places that predict a trained token reach the head. It is called as a module, because FSDP
        # gathers a module's weight for the time of its forward.
        hidden = self.scale * hidden[0, batch.predict_at]  # (T, D)
        token_logps = self.model.get_output_embeddings()(hidden, batch.targets)  # (T,)
        sums = token_logps.new_zeros(2 * batch.pairs).index_add(0, batch.step, token_logps)
        return sums.view(2, -1).clone()  # FSDP hooks what a module returns, and warns if that is a view

    def plain_logp(self, prefix: list[int], step: list[int]) -> Tensor:
        """() fp32: of the step after the prefix, by the model's own forward, the library's attention and
        whole logits: nothing of what `forward` does to be fast."""
        ids = torch.tensor([prefix + step], device=local_device())  # (1, L)
        self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")
        logits = self.model(ids, use_cache=False, logits_to_keep=len(step) + 1).logits  # (1, S + 1 or L, V)
        self.model.set_attn_implementation("segments")
        return logits[0, -len(step) - 1:-1].float().log_softmax(-1).gather(1, ids[0, -len(step):, None]).sum()


# --------------------------------------------------------------------------- from pairs to log-probabilities


def micro_batches(pairs: Sequence[Pair], indices: Sequence[int], config: Config,
                  desc: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of one global batch, with their pairs' indices: as many as on other ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [pairs[i].tokens(config.share_prefix) for i in indices]
    plan = data.split(lengths, ranks, config.tokens_per_micro_batch)

    for shares in progress(plan, desc, unit="batch") if desc else plan:
        own = [int(indices[j]) for j in shares[rank]]
        yield own, data.pack([pairs[i] for i in own], config.share_prefix).to(local_device())


@torch.no_grad()
def all_logps(policy: Policy, pairs: Sequence[Pair], config: Config, desc: str) -> Tensor:
    """(2, N) fp32 on every rank: log-probabilities of the chosen and rejected steps of all pairs, in nats."""
    logps = torch.zeros(2, len(pairs), device=local_device())
    for own, batch in micro_batches(pairs, range(len(pairs)), config, desc):
        logps[:, own] = policy(batch)
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
    logps = torch.zeros_like(reference)  # of this batch's pairs, for the metrics

    for own, batch in micro_batches(pairs, indices, config):
        chosen, rejected = policy(batch)
        reference_chosen, reference_rejected = reference[:, own]
        losses, _, _ = step_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, config.beta)

        # The mean over the global batch, however many ranks and micro-batches it is cut into. FSDP averages
        # gradients over the ranks, and what is wanted is their sum.
        loss = losses.sum() / len(indices)
        (loss * dist.get_world_size()).backward()
        logps[:, own] = torch.stack([chosen, rejected]).detach()

    dist.all_reduce(logps)  # each pair was filled in by one rank
    metrics = average_metrics(logps[:, indices], reference[:, indices], config.beta)
    # The gradients stay sharded; the norm is that of all shards together.
    norm = clip_grad_norm_(optimizer, config.max_grad_norm).full_tensor().item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        some = ", ".join(pairs[i].where for i in indices[:5])
        raise InputError(f"step {step}: loss {metrics['loss']}, gradient norm {norm}; nothing was updated. "
                         f"Try a lower --learning-rate; the pairs: {some} ...")

    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - began
    tokens = sum(pairs[i].tokens(config.share_prefix) for i in indices)
    metrics |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_second": tokens / seconds, "pairs_per_second": len(indices) / seconds}
    if local_device().type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def average_metrics(logps: Tensor, reference: Tensor, beta: float) -> dict[str, float]:
    """Averages over N pairs, of (2, N) log-probabilities, under TRL's names, so that plots overlay."""
    chosen, rejected = logps
    losses, chosen_rewards, rejected_rewards = step_dpo_loss(chosen, rejected, *reference, beta)
    per_pair = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    averages = torch.stack([values.double().mean() for values in per_pair.values()])
    return dict(zip(per_pair, averages.tolist(), strict=True))  # one copy from the device


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
    metrics = average_metrics(all_logps(policy, held_out, config, "evaluating"), reference, config.beta)
    if not math.isfinite(metrics["loss"]):
        raise InputError(f"step {step}: held-out loss {metrics['loss']}; nothing was exported. "
                         "Try a lower --learning-rate")
    log(config, {"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})

    # Before the first step the policy is its own reference, and no reward is the larger one.
    accuracy = f"{metrics['rewards/accuracies']:.1%}" if step > 0 or config.reference else "-"
    print0(f"step {step:4d}   held-out loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.4f}, "
           f"accuracy {accuracy}")


def train(config: Config) -> None:
    """The whole run: read, self-check, reference pass, optimizer steps, export. Collective."""
    start_processes(config.timeout)
    lock = runs.claim_output_dir(config)  # held until this returns

    # What is trained on, in how many optimizer steps.
    folder = storage.resolve(config.model)
    storage.check_config(folder)
    if config.test_problems:
        refuse_answering(folder, config)
    tokenizer = data.read_tokenizer(folder)
    pairs, held_out = read_pairs(tokenizer, config)
    identity = runs.identity_of(folder, data.fingerprint(pairs), data.fingerprint(held_out), config)
    runs.refuse_other_nodes(identity, config)
    if runs.is_finished(identity, config):
        return print0(f"finished    already: {config.output_dir}/model")
    runs.refuse_full_disk(folder, config)
    config = fill_budget(config, pairs + held_out)
    steps = config.epochs * data.steps_per_epoch(len(pairs), config.batch_size)
    steps = min(steps, config.max_steps or steps)

    # The policy before training is the reference: what it says of each pair is computed once.
    policy, reference, held_out_reference = reference_pass(folder, pairs, held_out, steps, tokenizer, config)
    AdamW = HostAdamW if config.offload else torch.optim.AdamW
    optimizer = AdamW(policy.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    if config.offload == "gradients":
        optimizer.take_gradients()

    with files.noticing_stop_signals() as stop_asked:
        first = start_or_resume(policy, optimizer, identity, steps, config)
        began, seen = time.perf_counter(), 0
        bar = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step",
                   disable=dist.get_rank() > 0)
        for step in bar:
            if step % config.eval_every == 0:
                evaluate(step, policy, held_out, held_out_reference, config)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config)
            indices = data.indices_of_step(step, len(pairs), config.batch_size, config.seed)
            metrics = train_step(step, policy, optimizer, pairs, indices, reference, config)
            log(config, {"step": step, **metrics})

            seen += len(indices)
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.4f}, "
                                f"{metrics['pairs_per_second']:.1f} pairs/s", refresh=False)
            save_if_due(policy, optimizer, step + 1, steps, stop_asked, config)

    # The model comes last: a run is finished if and only if it is there.
    evaluate(steps, policy, held_out, held_out_reference, config)
    storage.export(policy, folder, f"{config.output_dir}/model")
    minutes = (time.perf_counter() - began) / 60
    print0(f"finished    {steps - first} optimizer steps, {seen:,} pairs in {minutes:.1f} min",
           f"            metrics in {config.output_dir}/metrics.jsonl, model in {config.output_dir}/model")
    del lock


# ---------------------------------------------------------------------------- before the first optimizer step


def read_pairs(tokenizer: Any, config: Config) -> tuple[list[Pair], list[Pair]]:
    """The training and the held-out pairs."""
    rows = [row for source in config.data for row in data.read_rows(source)]
    held_out = []
    if isinstance(config.eval_data, float):
        rows, held_out = data.hold_out(rows, config.eval_data)
    elif config.eval_data:
        held_out = data.read_rows(config.eval_data)
    return encode("training", rows, tokenizer, config), encode("held-out", held_out, tokenizer, config)


def encode(name: str, rows: list, tokenizer: Any, config: Config) -> list[Pair]:
    """The pairs of some rows. Says how many were dropped, and why."""
    if not rows:
        return []
    pairs, dropped = data.encode(rows, tokenizer, config.template, config.instruction, config.span,
                                 config.max_length)
    too_long = f"longer than --max-length {config.max_length}"
    print0(f"{name:11s} {len(pairs):,} pairs, {len(dropped.get(too_long, [])):,} dropped as {too_long}")
    for reason, places in dropped.items():
        print0(f"{'':11s} dropped {len(places):,}: {reason} (first: {', '.join(places[:3])})")
    return pairs


def fill_budget(config: Config, pairs: list[Pair]) -> Config:
    """With --tokens-per-micro-batch, if it was not given. Raises InputError if a pair exceeds it."""
    longest = max(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    needed = longest.tokens(config.share_prefix)
    usual = 8192 if local_device().type == "cuda" else 1024
    if config.offload == "all":
        usual *= 2  # every micro-batch brings all weights up, and all gradients down
    budget = config.tokens_per_micro_batch or max(needed, usual)
    if needed > budget:
        raise InputError(f"{longest.where}: takes {needed} tokens, more than --tokens-per-micro-batch "
                         f"{budget}; raise that or lower --max-length")
    return Config(**{**vars(config), "tokens_per_micro_batch": budget})


def refuse_answering(folder: str, config: Config) -> None:
    """Raise InputError if a process cannot hold the model, as --test-problems has each of them do."""
    needed = storage.count_numbers(folder) * getattr(torch, config.dtype).itemsize
    if local_device().type == "cuda":
        room = torch.cuda.get_device_properties(local_device()).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // files.local_processes()
    if needed > 0.9 * room:
        raise InputError(
            f"--test-problems: each process would hold the model, {needed / 1e9:,.0f} GB, and has "
            f"{room / 1e9:,.0f} GB. Leave it away, and ask a server before and after: vllm serve MODEL; "
            f"python -m pairs solve --server http://localhost:8000 --model MODEL --problems "
            f"{config.test_problems} --samples 1 --temperature 0 --out ANSWERS")


def reference_pass(folder: str, pairs: list[Pair], held_out: list[Pair], steps: int, tokenizer: Any,
                   config: Config) -> tuple[Policy, Tensor, Tensor]:
    """The policy, checked, and the reference log-probabilities of training and held-out pairs, (2, N) each.

    The reference is the model before training, so the policy itself computes them; nothing else is kept of
    it. With --reference another model does, which is then put away.
    """
    reference_folder = storage.resolve(config.reference) if config.reference else folder
    if config.reference and data.read_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--reference {config.reference}: its vocabulary is not that of {config.model}")

    policy = build(reference_folder, config)
    describe(policy, pairs, steps, tokenizer, config)
    self_check(policy, reference_folder, pairs, held_out, config)
    reference = reference_logps(policy, reference_folder, "training", pairs, config)
    held_out_reference = reference_logps(policy, reference_folder, "held-out", held_out, config)

    if config.reference:
        del policy
        gc.collect()  # sharded layers stand in reference cycles, and two models may not fit
        policy = build(folder, config)
        self_check(policy, folder, pairs, held_out, config)
    return policy, reference, held_out_reference


def describe(policy: Policy, pairs: list[Pair], steps: int, tokenizer: Any, config: Config) -> None:
    """Say what will happen, so that a wrong template is seen before hours are spent."""
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    prefix, chosen, rejected = (sum(len(pair[i]) for pair in pairs) / len(pairs) for i in range(3))
    saved = prefix / (2 * prefix + chosen + rejected)
    per_step = len(pairs) / data.steps_per_epoch(len(pairs), config.batch_size)
    saves = "saves" if config.share_prefix else "would save"
    print0(f"model       {config.model}: {policy.name}, {parameters / 1e6:,.1f}M parameters",
           f"processes   {dist.get_world_size()} x {device_name()}, CPU threads of each: "
           f"{torch.get_num_threads()}; compute in {config.dtype}, master weights in float32",
           f"lengths     prefix {prefix:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} tokens on "
           f"average; sharing the prefix {saves} {saved:.0%} of all tokens",
           f"steps       {steps} optimizer steps of about {per_step:.0f} pairs, "
           f"{config.tokens_per_micro_batch} tokens per micro-batch",
           f"example     {pairs[0].where}, the trained tokens in [[...]]:",
           *(f"    | {line}" for line in data.marked_text(pairs[0], tokenizer).splitlines()))


@torch.no_grad()
def self_check(policy: Policy, folder: str, pairs: list[Pair], held_out: list[Pair], config: Config) -> None:
    """Packed log-probabilities of two pairs against the model's own on their four plain sequences.

    Attention that does not keep to the segments would otherwise be silent. Raises InputError if one of the
    four differs by more than rounding, and if the tokenizer is another model's.
    """
    # An index out of range is a device assert on CUDA, and no message.
    embeddings = policy.model.get_input_embeddings().num_embeddings
    limit = models.position_limit(policy.model)
    for pair in pairs + held_out:
        length = len(pair.prefix) + max(len(pair.chosen), len(pair.rejected))
        if length > limit:
            raise InputError(f"{pair.where}: has {length} tokens, but {policy.name} has no positions beyond "
                             f"{limit}, or computes them in another way; use --max-length {limit}")
        largest = max(pair.prefix + pair.chosen + pair.rejected)
        if largest >= embeddings:
            raise InputError(f"{pair.where}: has token {largest}, but {folder} has {embeddings} embeddings; "
                             "its tokenizer belongs to another model")

    by_length = sorted(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    sample = [by_length[-1], by_length[0]]  # the longest meets the windows; two show that pairs are separate
    with storage.reading(folder):  # what the model says if it cannot run on the library's sdpa
        packed = policy(data.pack(sample, config.share_prefix).to(local_device()))  # (2, 2)
        differences = []
        for pair, logps in zip(sample, packed.T, strict=True):
            for step, logp in zip((pair.chosen, pair.rejected), logps, strict=True):
                differences.append((logp - policy.plain_logp(pair.prefix, step)).abs() / len(step))
    worst = torch.stack(differences).max().item()  # NaN if one is

    # bf16 logits alone are off by 0.02-0.04. Where experts are nearly tied, rounding chooses between them:
    # random mixtures differed by up to 0.16, dense models by 0.024; steps that see each other, by 0.4 to 1.8.
    allowed = 1e-3 if config.dtype == "float32" else 0.3 if models.is_mixture(policy.model) else 0.1
    if not worst <= allowed:
        raise InputError(f"{policy.name}: packed log-probabilities differ from plain ones by {worst:.2g} "
                         f"nats per token (allowed: {allowed:g}), so it cannot be trained here")
    print0(f"self-check  packed and plain log-probabilities differ by {worst:.1e} nats per token")


def reference_logps(policy: Policy, folder: str, name: str, pairs: Sequence[Pair], config: Config) -> Tensor:
    """(2, N) log-probabilities under the reference, computed as the policy's are, or from the cache."""
    if not pairs:
        return torch.empty(2, 0)
    is_reader = dist.get_rank() == 0  # rank 0 alone reads and writes: other nodes may have other disks
    path = cache_path(folder, pairs, config) if is_reader else ""
    found = [runs.read_cached(path, (2, len(pairs))) if is_reader else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        print0(f"reference   log-probabilities of {name} pairs read from {path}")
        return found[0].to(local_device())

    logps = all_logps(policy, pairs, config, f"reference ({name})")
    kept = not is_reader or runs.write_cached(path, logps)
    print0(f"reference   log-probabilities of {name} pairs computed" + (f", kept in {path}" if kept else ""))
    return logps


def cache_path(folder: str, pairs: Sequence[Pair], config: Config) -> str:
    """In $STEPDPO_CACHE, by default ~/.cache/stepdpo, under a hash of the model's files, the token ids (so of
    data, template, span and tokenizer) and what changes the arithmetic."""
    # Large tensors are only sampled, so the time of writing counts: a model retrained in place is another.
    written = [os.stat(f"{folder}/{file}").st_mtime_ns for file in storage.weight_files(folder)]
    key = files.content_key(
        storage.model_identity(folder), str(written), data.fingerprint(pairs), config.dtype,
        str(config.share_prefix), local_device().type, torch.__version__, transformers.__version__)
    cache = os.environ.get("STEPDPO_CACHE") or os.path.expanduser("~/.cache/stepdpo")
    return os.path.join(cache, f"{key}.safetensors")


# -------------------------------------------------------------------------------------- building and sharding


def build(folder: str, config: Config) -> Policy:
    """The model in a folder, sharded over all ranks, in eval mode: training has no dropout either.

    It is built on the meta device, where parameters take no memory, then sharded, and only then do the shards
    get memory and numbers: no rank ever holds the whole model.
    """
    with storage.reading(folder):
        hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(hf_config, "quantization_config", None):
            raise InputError(f"{folder}: quantized weights cannot be trained (quantization_config in its "
                             "config.json); use the model they were made from")
        name = (hf_config.architectures or [hf_config.model_type])[0]
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config, dtype=torch.float32, attn_implementation="segments", trust_remote_code=False)
    except Exception as error:  # whatever a configuration leads to
        if error.args == ("segments",):  # it looks its attention class up by that name
            refuse_model(name, models.OWN_ATTENTION)
        refuse_model(name, f"transformers cannot build it from {folder}/config.json "
                           f"({type(error).__name__}: {' '.join(str(error).split())[:300]})")
    with storage.reading(folder):
        policy = Policy(model).eval()
        models.compute_buffers(model, local_device())
        shard(policy, config)
        storage.load(policy, folder)
    return policy


def shard(policy: Policy, config: Config) -> None:
    """FSDP2: each decoder layer is gathered while it runs; untied embedding and head too; then the rest."""
    model, device = policy.model, local_device()
    named = [module for module in model.modules()
             if type(module).__name__ in (model._no_split_modules or ())]
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    layers = named or max(lists, key=len, default=())  # older models do not name their decoder layers

    on_host = config.offload == "all"
    offload = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    wrap = partial(
        fsdp.fully_shard,
        mesh=mesh_of_ranks(config.shard_size),
        mp_policy=fsdp.MixedPrecisionPolicy(getattr(torch, config.dtype), reduce_dtype=torch.float32),
        offload_policy=offload if on_host else fsdp.OffloadPolicy(),
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
    fsdp.register_fsdp_forward_method(policy, "plain_logp")

    # Memory for the shards. Not `to_empty`, which would empty the buffers too.
    home = torch.device("cpu") if on_host else device
    policy._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    if tied:
        head.weight = embedding.weight  # _apply has made two of one


def mesh_of_ranks(shard_size: int | None) -> DeviceMesh:
    """All ranks share one copy of the model, or each `shard_size` neighbours one: FSDP then gathers layers
    among these, and only the gradients' sums go further."""
    ranks, device = dist.get_world_size(), local_device().type
    if shard_size in (None, ranks):
        return init_device_mesh(device, (ranks,))
    if ranks % shard_size:
        raise InputError(f"--shard-size {shard_size}: must divide the number of processes, {ranks}")
    return init_device_mesh(device, (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


# ------------------------------------------------------------------------------------------ the output folder


def start_or_resume(policy: Policy, optimizer: torch.optim.Optimizer, identity: dict[str, Any], steps: int,
                    config: Config) -> int:
    """Load the newest checkpoint, if there is one, and write run.json. Returns the optimizer steps done."""
    out = config.output_dir
    first, metrics = runs.load_checkpoint(policy, optimizer, f"{out}/checkpoints")
    if dist.get_rank() == 0:
        packages = ("torch", "triton", "transformers", "safetensors", "numpy")
        record = {**identity, "config": vars(config),  # tokens per micro-batch filled in
                  "optimizer_steps": steps, "processes": dist.get_world_size(),
                  "device": device_name(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "versions": {package: version(package) for package in packages}}
        files.write_atomically(f"{out}/run.json", json.dumps(record, indent=2) + "\n")
        files.write_atomically(f"{out}/metrics.jsonl", metrics)  # what came after the checkpoint comes again
    if first:
        print0(f"resuming    after optimizer step {first}")
    return first


def save_if_due(policy: Policy, optimizer: torch.optim.Optimizer, done: int, steps: int,
                stop_asked: list[int], config: Config) -> None:
    """Save every --save-every optimizer steps, and if any rank was asked to stop; that ends the run here."""
    # The signal may reach the ranks between different steps, but all must save the same one.
    asked = torch.tensor(max(stop_asked, default=0), device=local_device())
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    is_last = done == steps
    stopping = asked.item() > 0 and not is_last

    # The last step is saved too, because the export may find the disk full.
    if stopping or config.save_every and (is_last or done % config.save_every == 0):
        path = f"{config.output_dir}/metrics.jsonl"
        runs.save_checkpoint(policy, optimizer, f"{config.output_dir}/checkpoints", done,
                             files.read_bytes(path).decode() if dist.get_rank() == 0 else "")
    if stopping:
        print0(f"stopped     after optimizer step {done} of {steps}; "
               "the same command with --resume continues")
        sys.exit(128 + int(asked))


def log(config: Config, line: dict[str, float]) -> None:
    """Add a line to metrics.jsonl."""
    if dist.get_rank() == 0:
        files.add_lines(f"{config.output_dir}/metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")


# ---------------------------------------------------------------------------------------- processes and flags


def start_processes(minutes: float = 30) -> None:
    """Join the process group that torchrun describes, or be a group of one."""
    cuda, local_rank = torch.cuda.is_available(), files.local_rank()
    use_cores_and_memory_well()
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here "
                         "(CUDA_VISIBLE_DEVICES= hides them and trains on the CPU)")
    if cuda:
        torch.cuda.set_device(local_rank)
    # gloo too on CUDA: with --offload all the gradients, whose norm is needed, are in CPU memory.
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        with files.joining():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    timeout=timedelta(minutes=minutes), **alone)


def use_cores_and_memory_well() -> None:
    """What torch could have better defaults for."""
    # torchrun gives each process one thread, unless told otherwise.
    if os.environ.get("OMP_NUM_THREADS") == "1" and files.local_processes() > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // files.local_processes()))
    # Rows have all lengths, and blocks of fixed size would leave holes. Page-locked host memory would be
    # rounded up to powers of two: by 72% for the embedding of Qwen2-72B on 8 GPUs.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        settings = "expandable_segments:True,pinned_max_round_threshold_mb:1"
        os.environ.setdefault("PYTORCH_ALLOC_CONF", settings)


def local_device() -> torch.device:
    """Of this rank, as `start_processes` has set it."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if local_device().type == "cuda" else "CPU"


def parse(argv: Sequence[str] | None = None) -> Config:
    """The flags. The defaults are the paper's, where the paper has the thing."""
    parser = files.Parser("stepdpo.py", description=__doc__, epilog=(
        "@FILE reads flags from FILE, written as on the command line; # starts a comment."))
    switch, cuda = argparse.BooleanOptionalAction, torch.cuda.is_available()

    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=TEXT, required=True, help="to train: a folder with safetensors, or hub name")
    add("--data", type=TEXT, nargs="+", required=True, metavar="FILE",
        help="step pairs: .jsonl, .json, .parquet files or hub datasets")
    add("--output-dir", type=TEXT, required=True, help="for metrics.jsonl, run.json, checkpoints/, model/")
    add("--reference", type=TEXT, help="reference model [the model itself before training]")
    add("--span", choices=data.SPANS, default="step", help="one step, or whole solutions: plain DPO [step]")
    add("--template", choices=data.TEMPLATES, default="chat", help="around problem and answer [chat]")
    add("--instruction", help="text after the problem in the user turn, '' for none [the template's own]")
    add("--max-length", type=POSITIVE_INT, default=1024, help="tokens; drop longer pairs, counted [1024]")

    add = parser.add_argument_group("the method").add_argument
    add("--beta", type=POSITIVE_FLOAT, default=0.4,
        help="strength of the pull towards the reference; paper: 0.4, and 0.5 for 72B [0.4]")
    add("--learning-rate", type=POSITIVE_FLOAT, default=5e-7, help="at its peak; then cosine to 0 [5e-7]")
    add("--warmup-ratio", type=SHARE, default=0.1, help="share of optimizer steps in which it rises [0.1]")
    add("--batch-size", type=POSITIVE_INT, default=128, help="pairs per optimizer step of all ranks [128]")
    add("--epochs", type=POSITIVE_INT, default=8, help="passes over the pairs; paper: 8, above 30B 4 [8]")
    add("--max-steps", type=INT, default=0, help="end the schedule after so many optimizer steps [no limit]")
    add("--max-grad-norm", type=POSITIVE_FLOAT, default=1.0, help="clip the gradient to this norm [1.0]")
    add("--seed", type=INT, default=0, help="of the order of the pairs [0]")

    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval-data", type=source_or_share, metavar="FILE",
        help="held-out step pairs: the same metrics, no training; 0.05 holds out pairs of so many problems")
    add("--eval-every", type=POSITIVE_INT, default=50, help="optimizer steps between evaluations [50]")
    add("--test-problems", type=TEXT, help="held-out problems with answers: at the end, greedy accuracy "
        "before and after, in answers of at most --max-length tokens; each process holds a whole model")
    add("--save-every", type=INT, default=0, help="optimizer steps between checkpoints [only at SIGTERM]")
    add("--resume", action=switch, default=False, help="continue from the last checkpoint in --output-dir, "
        "or from the start if there is none")

    add = parser.add_argument_group("memory and speed: the result stays the same").add_argument
    add("--tokens-per-micro-batch", type=POSITIVE_INT,
        help="tokens in one forward and backward of a rank [8192 on CUDA, 1024 on CPU]")
    add("--share-prefix", action=switch, default=True, help="lay out once what chosen and rejected share")
    add("--activation-checkpointing", action=switch, default=cuda,
        help="keep only each layer's input: less memory, 1/3 more work [on CUDA, not on CPU]")
    add("--offload", choices=OFFLOADS, help="keep in host memory AdamW's moments; these and the gradients; "
        "or all, with the weights. bench/plan.py says what a model needs [nothing]")
    add("--shard-size", type=POSITIVE_INT,
        help="processes that share one copy of the model, those of a node where it fits there [all]")
    add("--compile", action=switch, default=False, help="torch.compile each decoder layer")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if cuda else "float32",
        help="compute type; master weights are float32 [bfloat16 on CUDA, else float32]")
    add("--timeout", type=MINUTES, default=30.0,
        help="minutes that processes wait for each other before they give up [30]")
    return parser.parse_args(argv)


MINUTES = files.checked(float, lambda x: 0 < x <= 1e6, "above 0 and at most 1000000")


def source_or_share(text: str) -> str | float:
    """Of --eval-data: a number, where no file is called that, is a share of the training data."""
    try:
        share = float(text)
    except ValueError:
        return TEXT(text)
    if os.path.exists(text):
        return text
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a file or above 0 and below 1, got {text}")
    return share


def run(config: Config) -> None:
    """Train, and with --test-problems compare the model before and after."""
    if config.test_problems:
        from pairs.problems import read_problems
        read_problems(config.test_problems)  # what is wrong with them must not show only at the end
    train(config)
    if config.test_problems:
        from pairs.stages import report_gain
        gc.collect()  # the trained model stands in reference cycles
        report_gain(storage.resolve(config.model), f"{config.output_dir}/model", config)


def main() -> None:
    config = parse()
    files.run_command("stepdpo.py", partial(run, config))


if __name__ == "__main__":
    main()

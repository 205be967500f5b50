"""Step-DPO: preference optimization on pairs of single reasoning steps (Lai et al. 2024, arXiv:2406.18629).

Given a problem x, correct steps s_1..s_{k-1}, a correct next step s_win and a wrong one s_lose, eq. (2) is

    L = -E log sigmoid( beta * [ log pi(s_win | x, s_<k) / pi_ref(s_win | x, s_<k)
                               - log pi(s_lose | x, s_<k) / pi_ref(s_lose | x, s_<k) ] )

where pi_ref is the model before training. Only the step is trained on; all before it is context.

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT              # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-7B-Instruct \\
        --data xinlai/Math-Step-DPO-10K --output-dir OUT

In reading order: the loss; the policy, a model that returns log-probabilities of steps; building, sharding,
loading and exporting it; the log-probabilities of many pairs; the training loop. data.py says what a pair is
and how it becomes tokens, kernels.py why no logits are ever held.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import triton
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
from data import INSTRUCTION, SPANS, TEMPLATES, Batch, InputError, Pair, say, write_whole
from kernels import linear_logps


def flag(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every flag of the command line, with the paper's values as defaults."""

    model: str = flag(None, "model to train: a Hugging Face folder with safetensors, or hub name (required)")
    data: str = flag(None, "step pairs to train on: .jsonl, .json, .parquet or a hub dataset (required)")
    output_dir: str = flag(None, "folder for metrics.jsonl, run.json, checkpoints/, model/ (required)")
    eval_data: str = flag(None, "held-out step pairs: the same metrics, no training")
    test_problems: str = flag(None, "held-out problems with answers: at the end, greedy accuracy before and "
                                    "after, in answers of --max-length tokens at most, by the way of data.py "
                                    "solve: each process holds a whole model for it")
    reference: str = flag(None, "reference model, if it is not the model itself before training")
    span: str = flag("step", "train on one step, or on the whole solution (plain DPO)", tuple(SPANS))
    template: str = flag("chat", "how problem and answer are put together", TEMPLATES)
    instruction: str = flag(None, "text after the problem in the user turn, '' for none; default: the "
                                  f"template's own (chat and deepseek-math: '{INSTRUCTION}'; alpaca: none)")
    beta: float = flag(0.4, "strength of the pull towards the reference (paper: 0.4, and 0.5 for 72B)")
    learning_rate: float = flag(5e-7, "peak; linear warm-up, then cosine to 0")
    batch_size: int = flag(128, "pairs per optimizer step over all ranks, about (epochs are cut evenly)")
    tokens_per_micro_batch: int = flag(None, "tokens in one forward and backward of a rank: sets memory and "
                                             "speed, not the result (default: 4096 on CUDA, 1024 on CPU)")
    epochs: int = flag(8, "passes over the pairs (paper: 8, and 4 above 30B)")
    max_steps: int = flag(0, "end the schedule after so many optimizer steps; 0: after all epochs")
    warmup_ratio: float = flag(0.1, "share of the optimizer steps with rising learning rate")
    max_length: int = flag(1024, "tokens of prefix + step; longer pairs are dropped and counted, never cut")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm")
    eval_every: int = flag(50, "optimizer steps between evaluations (always one before and one after)")
    save_every: int = flag(0, "optimizer steps between checkpoints; 0: only when stopped by SIGTERM")
    resume: bool = flag(False, "continue from the checkpoint in --output-dir")
    share_prefix: bool = flag(True, "lay out only once what chosen and rejected have in common")
    activation_checkpointing: bool = flag(None, "keep only each layer's input: less memory, 1/3 more work "
                                                "(default: on CUDA, not on CPU)")
    offload: bool = flag(False, "keep parameters, gradients and optimizer state in CPU memory")
    compile: bool = flag(False, "torch.compile each decoder layer")
    dtype: str = flag(None, "compute type; master weights: float32 (default: bfloat16 on CUDA, else float32)",
                      ("bfloat16", "float32"))
    seed: int = flag(0, "order of the pairs")

    def __post_init__(self) -> None:
        zero_is_fine = ("max_steps", "save_every", "warmup_ratio", "seed")
        for field in dataclasses.fields(self):
            name, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            choices, may_be_zero = field.metadata["choices"], field.name in zero_is_fine
            if field.name in ("model", "data", "output_dir") and not value:
                raise InputError(f"{name} is required")
            if choices and value not in (None, *choices):
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and may_be_zero):
                raise InputError(f"{name} must be {'at least' if may_be_zero else 'above'} 0, got {value}")


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
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)  # eq. (2)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ------------------------------------------------------------------------------------------------- the policy


class Head(nn.Linear):
    """The language-model head. Asked with targets it returns their log-probabilities, and no logits exist."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(hidden) if targets is None else linear_logps(hidden, self.weight, targets)


class Policy(nn.Module):
    """A causal language model that maps a packed batch to the log-probabilities of its trained tokens."""

    def __init__(self, model: nn.Module, share_prefix: bool):
        super().__init__()
        self.model, self.share_prefix = model, share_prefix
        self.config = model.config.get_text_config()
        self.name = type(model).__name__
        if getattr(model, "_is_stateful", False):
            raise InputError(f"{self.name} carries state from token to token, which packed rows "
                             "would mix up: it is not supported")
        for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logits_scaling",
                    "logit_scale", "lm_head_multiplier"):
            if getattr(self.config, key, None) not in (None, 1):
                raise InputError(
                    f"{self.name} changes its logits ({key} = {getattr(self.config, key)}), which is "
                    "not supported: what was trained would not be what the model computes")
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise InputError(f"{self.name}: the head must be a linear layer without bias, got {head}")
        head.__class__ = Head

    def forward(self, batch: Batch) -> Tensor:
        """(T,) fp32: log-probabilities of the trained tokens, in nats."""
        by_document = self.config._attn_implementation == "sdpa_by_document"
        extra = {"documents": batch.document.bincount()} if by_document else {}
        hidden = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            attention_mask=self.attention_mask(batch), **extra).last_hidden_state  # (1, L, D)
        return self.model.get_output_embeddings()(hidden[0, batch.predict_at], batch.targets)

    def plain_token_logps(self, ids: Tensor, trained: int) -> Tensor:
        """(trained,) fp32: of the last tokens of one sequence (L,), by the model's own forward and logits."""
        logits = self.model(ids[None], use_cache=False, logits_to_keep=trained + 1).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[-trained:, None])[:, 0]

    def attention_mask(self, batch: Batch) -> Any:
        """The rule of `data.may_attend` in the form the model's attention takes (a dict if layers differ)."""
        if not self.share_prefix:
            return None  # transformers takes a position that starts again at 0 for a new document
        window = getattr(self.config, "sliding_window", None)
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is None:  # like Mistral: a window, if there is one, is for all layers
            return self._mask(batch, window)
        if "sliding_attention" not in layer_types:
            return self._mask(batch, None)
        return {"full_attention": self._mask(batch, None), "sliding_attention": self._mask(batch, window)}

    def _mask(self, batch: Batch, window: int | None) -> Any:
        rule, length, device = data.may_attend(batch, window), batch.input_ids.size(1), batch.input_ids.device
        if self.config._attn_implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask
            return create_block_mask(rule, 1, None, length, length, device=device)
        index = torch.arange(length, device=device)
        return rule(0, 0, index[:, None], index[None, :])[None, None]  # (1, 1, L, L), True = attend


@torch.compiler.disable  # or it would compile anew for other lengths
def sdpa_by_document(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                     documents: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' "sdpa" in each document of a row by itself; `documents` has their lengths.

    query, key, value (1, heads, L, head size), mask (1, 1, L, L), True = attend -> (1, L, heads, head size).
    Over whole rows it took a quarter of a step on a CPU, because sdpa computes what a mask hides.
    """
    outputs, end = [], 0
    for length in [query.shape[2]] if documents is None else documents.tolist():
        here = slice(end, end := end + length)
        outputs.append(sdpa_attention_forward(module, query[:, :, here], key[:, :, here], value[:, :, here],
                                              None if mask is None else mask[..., here, here], **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("sdpa_by_document", sdpa_by_document)
AttentionMaskInterface.register("sdpa_by_document", sdpa_mask)


def step_logps(token_logps: Tensor, batch: Batch) -> Tensor:
    """Sum (T,) token log-probabilities by step: (2, B), chosen and rejected."""
    return token_logps.new_zeros(2 * batch.pairs).index_add(0, batch.sequence, token_logps).view(2, -1)


# --------------------------------------------------------------------- building, sharding, loading, exporting


def build(path: str, config: Config, device: torch.device) -> Policy:
    """The model in folder `path`, sharded over all ranks, in eval mode: training has no dropout either."""
    attention = "flex_attention" if device.type == "cuda" else "sdpa_by_document"
    hf_config = pretrained(AutoConfig, path)
    with parameters_on_meta(), reading(path):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32,
                                                 attn_implementation=attention)
    policy = Policy(model, config.share_prefix).eval()
    shard(policy, config, device)
    with reading(path):
        load(policy, path)
    return policy


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what the libraries say about a bad model folder into an error that names the folder."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: {error}") from None


def pretrained(kind: Any, path: str) -> Any:
    with reading(path):
        return kind.from_pretrained(path)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters get no memory; buffers (rotary frequencies, in no checkpoint) are computed as always."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        tied = parameter is None or parameter.is_meta  # registered before: it must stay the same object
        register(module, name, parameter if tied else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def shard(policy: Policy, config: Config, device: torch.device) -> None:
    """FSDP2: each decoder layer is gathered while it runs; untied embedding and head too; then the rest."""
    model = policy.model
    layers = [module for module in model.modules()
              if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(f"{policy.name} does not name its decoder layers (_no_split_modules): "
                         "it cannot be sharded")
    wrap = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(device.type == "cuda") if config.offload else OffloadPolicy(),
    )
    for layer in layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward)  # inside the checkpoint: outside it has no effect
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        wrap(layer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if not tied:
        wrap(embedding)
        wrap(head)
    wrap(policy, reshard_after_forward=True)  # else passes without gradients leave gathered parameters behind
    home = torch.device("cpu") if config.offload else device
    policy._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    if tied:
        head.weight = embedding.weight  # _apply has made two of one
    register_fsdp_forward_method(policy, "plain_token_logps")


def weight_files(path: str) -> dict[str, str]:
    """Tensor name -> safetensors file, of the model in folder `path`."""
    index = os.path.join(path, "model.safetensors.index.json")
    single = os.path.join(path, "model.safetensors")
    if os.path.exists(index):
        with open(index) as file:
            return {name: os.path.join(path, part) for name, part in json.load(file)["weight_map"].items()}
    if not os.path.exists(single):
        raise InputError(f"{path}: has no model.safetensors(.index.json); "
                         "only safetensors weights are loaded")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


@torch.no_grad()
def load(policy: Policy, path: str) -> None:
    """Fill the shards: each rank reads only its own rows of each tensor.

    Raises InputError if the tensors in the folder are not, one to one, those of the model.
    """
    files, tensors = weight_files(path), policy.model.state_dict(keep_vars=True)
    filled = {tensor for name, tensor in tensors.items() if name in files}  # tied: stored once or twice
    missing = [name for name, tensor in tensors.items() if tensor not in filled]
    unknown = [name for name in files if name not in tensors and not name.endswith("inv_freq")]  # recomputed
    if missing or unknown:
        raise InputError(f"{path}: its tensors are not one to one those of {policy.name}, which is not "
                         f"supported (missing: {missing[:3]}, left over: {unknown[:3]})")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in tqdm(tensors.keys() & files, desc="loading", unit="tensor", disable=rank != 0, leave=False):
        with safe_open(files[name], "pt") as file:
            tensor, rows = tensors[name], file.get_slice(name)
            if rows.get_shape() != list(tensor.shape):
                raise InputError(f"{files[name]}: {name} must be {[*tensor.shape]}, got {rows.get_shape()}")
            if isinstance(tensor, DTensor):
                chunk = -(-len(tensor) // ranks)  # FSDP cuts dimension 0 like torch.chunk
                tensor.to_local().copy_(rows[min(rank * chunk, len(tensor)):(rank + 1) * chunk])
            else:
                tensor.copy_(rows[...])


@torch.no_grad()
def export(policy: Policy, source: str, path: str) -> None:
    """Write the folder `source` again with the trained numbers in it: same files, names and dtypes, so
    whatever loads one loads the other. Complete or absent, never half."""
    files, tensors = weight_files(source), policy.model.state_dict()
    writer, new = dist.get_rank() == 0, path + ".tmp"
    if writer:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        for name in os.listdir(source):  # configuration, tokenizer, chat template: byte for byte
            if name.endswith((".json", ".jinja", ".txt", ".model")):
                shutil.copy(os.path.join(source, name), new)
    parts = sorted(set(files.values()))
    for part in tqdm(parts, desc="exporting", unit="file", disable=not writer, leave=False):
        whole = {}
        with safe_open(part, "pt") as before:
            for name in sorted(name for name in files if files[name] == part):
                if name not in tensors:
                    whole[name] = before.get_tensor(name)
                    continue
                full = tensors[name].full_tensor() if isinstance(tensors[name], DTensor) else tensors[name]
                if writer:  # the other ranks only take part in the gathering
                    whole[name] = full.to("cpu", before.get_slice(name)[:0].dtype, copy=True)
        if writer:
            target = os.path.join(new, os.path.basename(part))
            save_file(whole, target, metadata={"format": "pt"})
            shutil.copymode(part, target)  # safetensors writes files that only their owner can read
    if writer:
        shutil.rmtree(path, ignore_errors=True)
        os.rename(new, path)
    dist.barrier()


def resolve(name: str) -> str:
    """A local folder, or the hub model of that name brought to this machine."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise InputError(f"{name}: no such folder (a hub model is called owner/name)")
    from huggingface_hub import snapshot_download
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            snapshot_download(name, allow_patterns=wanted)
        dist.barrier()
        return snapshot_download(name, allow_patterns=wanted, local_files_only=True)
    except Exception as error:  # the hub's client has a large family of errors of its own
        raise InputError(f"{name}: not a folder here, and not to be had from the hub ({error})") from None


# ---------------------------------------------------------------------------- log-probabilities of many pairs


def micro_batches(pairs: Sequence[Pair], indices: Sequence[int], config: Config, device: torch.device,
                  desc: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of one global batch, with their pairs' indices: as many as on other ranks.

    On CUDA rows are padded to multiples of 1/8 of the budget: each new length compiles the attention again.
    """
    lengths = [pairs[i].tokens(config.share_prefix) for i in indices]
    multiple = -(-config.tokens_per_micro_batch // 1024) * 128 if device.type == "cuda" else 1
    plan = data.split(lengths, dist.get_world_size(), config.tokens_per_micro_batch)
    quiet = desc is None or dist.get_rank() != 0
    for ranks in tqdm(plan, desc=desc, unit="batch", disable=quiet, leave=False):
        mine = [int(indices[j]) for j in ranks[dist.get_rank()]]
        yield mine, data.pack([pairs[i] for i in mine], config.share_prefix, multiple).to(device)


@torch.no_grad()
def all_logps(policy: Policy, pairs: Sequence[Pair], config: Config, device: torch.device,
              desc: str) -> Tensor:
    """(2, N) fp32 on every rank: log-probabilities of the chosen and rejected steps of all pairs, in nats."""
    logps = torch.zeros(2, len(pairs), device=device)
    for mine, batch in micro_batches(pairs, range(len(pairs)), config, device, desc):
        logps[:, mine] = step_logps(policy(batch), batch)
    dist.all_reduce(logps)  # each pair was filled in by one rank
    return logps


@torch.no_grad()
def self_check(policy: Policy, pairs: Sequence[Pair], config: Config, device: torch.device) -> float:
    """Packed log-probabilities of two pairs against the model's own logits on their four plain sequences.

    A wrong mask is silent: `eager` attention adds a boolean mask to the scores, others ignore it. Returns the
    largest of the four mean differences in nats per token; raises InputError if it is more than rounding.
    """
    order = sorted(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    sample = [order[-1], order[0]]  # the longest meets every window; a second shows that pairs are separate
    packed = policy(data.pack(sample, config.share_prefix).to(device))
    plain = [policy.plain_token_logps(torch.tensor(pair.prefix + step, device=device), len(step))
             for pair in sample for step in (pair.chosen, pair.rejected)]
    packed = packed.split([len(logps) for logps in plain])
    difference = max((a - b).abs().mean().item() for a, b in zip(packed, plain, strict=True))
    allowed = 1e-3 if config.dtype == "float32" else 0.1  # bf16 logits alone are off by 0.02-0.04
    if not difference <= allowed:
        raise InputError(
            f"{policy.name} with {policy.config._attn_implementation} attention: packed log-probabilities "
            f"differ from plain ones by {difference:.2g} nats per token (allowed: {allowed:g}), so it does "
            "not follow the packed mask; "
            + ("use --no-share-prefix" if config.share_prefix else "this model cannot be trained here"))
    return difference


def reference_logps(policy: Policy, path: str, name: str, pairs: Sequence[Pair], config: Config,
                    device: torch.device) -> Tensor:
    """(2, N) log-probabilities under the reference, computed as the policy's are, or from the cache.

    The cache ($STEPDPO_CACHE, by default ~/.cache/stepdpo) is keyed by a hash of the model's files, the token
    ids (so of data, template, span and tokenizer) and what changes the arithmetic.
    """
    times = [os.stat(file).st_mtime_ns for file in sorted(set(weight_files(path).values()))]
    key = [data.model_identity(path), times, data.fingerprint(pairs), config.dtype, config.share_prefix,
           device.type, torch.__version__, transformers.__version__]
    folder = os.environ.get("STEPDPO_CACHE") or os.path.expanduser("~/.cache/stepdpo")
    file = os.path.join(folder, hashlib.sha256(repr(key).encode()).hexdigest()[:32] + ".safetensors")
    cached = [os.path.exists(file)]
    dist.broadcast_object_list(cached)  # rank 0 decides: other nodes may have other disks
    if not cached[0]:
        logps = all_logps(policy, pairs, config, device, f"reference ({name})")
        if dist.get_rank() == 0:
            os.makedirs(folder, exist_ok=True)
            save_file({"logps": logps.cpu()}, f"{file}.{os.getpid()}")
            os.replace(f"{file}.{os.getpid()}", file)
    elif dist.get_rank() == 0:
        logps = load_file(file)["logps"].to(device)
    else:
        logps = torch.empty(2, len(pairs), device=device)
    dist.broadcast(logps, 0)
    say(f"reference   log-probabilities of {name} pairs "
        f"{'read from' if cached[0] else 'computed, kept in'} {file}")
    return logps


# ----------------------------------------------------------------------------------------------- the training

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected")


def loss_and_metrics(logps: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """From (2, B) policy and reference logps: the summed loss, and the sums of METRICS, (7,) fp64."""
    losses, chosen, rejected = step_dpo_loss(*logps, *reference, beta)
    rows = [losses.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float(),
            *logps.detach()]
    return losses.sum(), torch.stack(rows).double().sum(1)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then cosine to 0. Unlike in Hugging Face's schedule the first step's rate is not 0."""
    warmup = math.ceil(config.warmup_ratio * steps - 1e-9)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def train(config: Config) -> None:
    """The whole run: read, load, self-check, reference logps, optimizer steps, export. Collective."""
    device, out = start_processes(), config.output_dir
    if os.path.isdir(os.path.join(out, "model")) and config.resume:
        return say(f"finished    already: {os.path.join(out, 'model')}")
    if os.path.exists(os.path.join(out, "metrics.jsonl")) and not config.resume:
        raise InputError(f"{out}: already holds a run; continue it with --resume "
                         "or choose another --output-dir")
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"--output-dir {out}: is not a folder")
    path = resolve(config.model)
    tokenizer = pretrained(AutoTokenizer, path)
    sets, dropped = {}, {}
    for name, source in (("training", config.data), ("held-out", config.eval_data)):
        if source:
            sets[name], dropped[name] = data.encode(data.read_rows(source), tokenizer, config.template,
                                                    config.instruction, config.span, config.max_length)
    if config.test_problems:
        data.read_problems(config.test_problems)  # what is wrong with them must not show only at the end
    pairs = sets["training"]
    config = complete(config, sets, device)
    plan = data.schedule(len(pairs), config.batch_size, config.epochs, config.seed)
    plan = plan[:config.max_steps or len(plan)]

    reference_path = resolve(config.reference) if config.reference else path
    if config.reference and pretrained(AutoTokenizer, reference_path).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--reference {config.reference}: its vocabulary is not that of {config.model}")
    policy = build(reference_path, config, device)
    largest, where = max((max(map(max, pair[:3])), pair.where) for name in sets for pair in sets[name])
    if largest >= policy.config.vocab_size:
        raise InputError(f"{where}: has token {largest}, but {config.model} has {policy.config.vocab_size} "
                         "embeddings; its tokenizer belongs to another model")
    describe(policy, config, device, tokenizer, sets, dropped, plan)
    say(f"self-check  packed and plain log-probabilities differ by "
        f"{self_check(policy, pairs, config, device):.1e} nats per token")
    reference = {name: reference_logps(policy, reference_path, name, sets[name], config, device)
                 for name in sets}
    if config.reference:
        del policy
        policy = build(path, config, device)
        self_check(policy, pairs, config, device)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    identity = {"config": dataclasses.asdict(config), "pairs": data.fingerprint(pairs),
                "weights": data.model_identity(path)}
    first = resume(policy, optimizer, identity, out) if config.resume else 0
    if dist.get_rank() == 0:
        os.makedirs(out, exist_ok=True)
        versions = {module.__name__: module.__version__
                    for module in (torch, triton, transformers, safetensors, numpy)}
        record = {**identity, "optimizer_steps": len(plan), "processes": dist.get_world_size(),
                  "device": kind(device), "versions": versions,
                  "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_whole(os.path.join(out, "run.json"), json.dumps(record, indent=2) + "\n")

    def evaluate(step: int) -> None:
        if "held-out" in sets:
            logps = all_logps(policy, sets["held-out"], config, device, "evaluating")
            means = loss_and_metrics(logps, reference["held-out"], config.beta)[1] / logps.shape[1]
            line = {"step": step, **{f"eval/{k}": v for k, v in zip(METRICS, means.tolist(), strict=True)}}
            log(out, line)
            say(f"step {step:4d}   held-out loss {line['eval/loss']:.4f}, "
                f"margin {line['eval/rewards/margins']:+.4f}, accuracy {line['eval/rewards/accuracies']:.1%}")

    stop_asked = []  # a preempted job is sent SIGTERM: finish the step, save, exit
    default = signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))
    began = time.perf_counter()
    bar = tqdm(total=len(plan), initial=first, desc="training", unit="step", disable=dist.get_rank() != 0)
    for step in range(first, len(plan)):
        if step % config.eval_every == 0:
            evaluate(step)
        step_began, indices = time.perf_counter(), plan[step]
        sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)
        for mine, batch in micro_batches(pairs, indices, config, device):
            logps = step_logps(policy(batch), batch)
            loss, metrics = loss_and_metrics(logps, reference["training"][:, mine], config.beta)
            (loss * dist.get_world_size() / len(indices)).backward()  # FSDP takes the mean over ranks
            sums[:-2] += metrics
            sums[-2] += batch.tokens
        sums[-1] = len(stop_asked)
        dist.all_reduce(sums)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).full_tensor().item()
        *totals, tokens, stop = sums.tolist()
        means = [total / len(indices) for total in totals]
        if not (math.isfinite(means[0]) and math.isfinite(norm)):
            raise InputError(
                f"step {step}: loss {means[0]}, gradient norm {norm}; nothing was updated. Try a lower "
                f"--learning-rate; the pairs: {', '.join(pairs[i].where for i in indices[:5])} ...")
        optimizer.param_groups[0]["lr"] = rate = learning_rate(step, len(plan), config)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - step_began
        line = {"step": step, **dict(zip(METRICS, means, strict=True)), "grad_norm": norm, "lr": rate,
                "tokens_per_second": tokens / seconds, "pairs_per_second": len(indices) / seconds}
        if device.type == "cuda":
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        log(out, line)
        bar.set_postfix_str(f"loss {line['loss']:.4f}, margin {line['rewards/margins']:+.4f}, "
                            f"{line['pairs_per_second']:.1f} pairs/s", refresh=False)
        bar.update()
        done = step + 1
        last = done == len(plan)  # with --save-every it is saved too: the export may find the disk full
        if config.save_every and (last or done % config.save_every == 0) or stop and not last:
            save(policy, optimizer, out, done)
        if stop and not last:
            bar.close()
            say(f"stopped     after optimizer step {done} of {len(plan)}; "
                "the same command with --resume continues")
            sys.exit(128 + signal.SIGTERM)
    bar.close()
    export(policy, path, os.path.join(out, "model"))
    evaluate(len(plan))
    signal.signal(signal.SIGTERM, default)
    minutes, seen = (time.perf_counter() - began) / 60, sum(map(len, plan[first:]))
    say(f"finished    {len(plan) - first} optimizer steps, {seen:,} pairs in {minutes:.1f} min\n"
        f"            metrics in {os.path.join(out, 'metrics.jsonl')}, model in {os.path.join(out, 'model')}")


def report_accuracy(config: Config) -> None:
    """Greedy accuracy on --test-problems before and after training. Collective; no model may be held."""
    gc.collect()  # the wrapped layers of the trained one are in reference cycles
    before = solved(resolve(config.model), "before", config)
    after = solved(os.path.join(config.output_dir, "model"), "after", config)
    points, low, high = (100 * x for x in paired_gain(before, after))
    n = len(before)
    say(f"accuracy    before {sum(before) / n:.1%}, after {sum(after) / n:.1%} on {n} held-out problems: "
        f"{points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}")


def solved(model: str, when: str, config: Config) -> list[bool]:
    """Whether each of --test-problems is answered rightly, greedily, in at most --max-length tokens."""
    flags = {"model": model, "problems": config.test_problems, "template": config.template,
             "instruction": config.instruction, "samples": 1, "temperature": 0, "dtype": config.dtype,
             "max-new-tokens": config.max_length, "out": os.path.join(config.output_dir, f"{when}.jsonl")}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    args = data.parse_arguments(["solve", *given])
    say(f"{when:11s} {model} answers {config.test_problems}:")
    return data.solve(args, data.Tools(args))


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same problems and its 95% interval, paired by problem."""
    n, changes = len(before), [a - b for a, b in zip(after, before, strict=True)]
    middle = sum(changes) / n
    spread = 1.96 * math.sqrt(sum((change - middle) ** 2 for change in changes)) / n
    return middle, middle - spread, middle + spread


def complete(config: Config, sets: dict[str, list[Pair]], device: torch.device) -> Config:
    """Fill in the defaults that depend on the device. Raises InputError if a pair exceeds the micro-batch."""
    cuda, every = device.type == "cuda", [pair for pairs in sets.values() for pair in pairs]
    longest = max(every, key=lambda pair: pair.tokens(config.share_prefix))
    needed = longest.tokens(config.share_prefix)
    budget = config.tokens_per_micro_batch or max(needed, 4096 if cuda else 1024)
    if needed > budget:
        raise InputError(f"{longest.where}: takes {needed} tokens, more than --tokens-per-micro-batch "
                         f"{budget}; raise that or lower --max-length")
    dtype = config.dtype or ("bfloat16" if cuda else "float32")
    keep_little = cuda if config.activation_checkpointing is None else config.activation_checkpointing
    return dataclasses.replace(config, dtype=dtype, tokens_per_micro_batch=budget,
                               activation_checkpointing=keep_little)


def describe(policy: Policy, config: Config, device: torch.device, tokenizer: Any,
             sets: dict[str, list[Pair]], dropped: dict[str, list[str]], plan: list) -> None:
    """Say what will happen, so that a wrong template or lost data is seen before hours are spent."""
    pairs = sets["training"]
    mean = [sum(len(pair[k]) for pair in pairs) / len(pairs) for k in range(3)]
    saved = 1 - sum(pair.tokens(True) for pair in pairs) / sum(pair.tokens(False) for pair in pairs)
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    say(f"model       {config.model}: {policy.name}, {parameters / 1e6:,.1f}M parameters, "
        f"{policy.config._attn_implementation} attention\n"
        f"processes   {dist.get_world_size()} x {kind(device)}, compute in {config.dtype}, "
        "master weights in float32")
    for name in sets:
        lost = dropped[name]
        hint = f"; raise that to keep them (first: {', '.join(lost[:3])})" if lost else ""
        say(f"{name:11s} {len(sets[name]):,} pairs, {len(lost):,} dropped as longer than --max-length "
            f"{config.max_length}{hint}")
    say(f"lengths     prefix {mean[0]:.0f}, chosen {mean[1]:.0f}, rejected {mean[2]:.0f} tokens in the mean; "
        f"sharing the prefix {'saves' if config.share_prefix else 'would save'} {saved:.0%} of all tokens\n"
        f"steps       {len(plan)} optimizer steps of about {len(plan[0])} pairs, "
        f"{config.tokens_per_micro_batch} tokens per micro-batch\n"
        f"example     {pairs[0].where}, the trained tokens in [[...]]:\n"
        + "\n".join(f"    | {line}" for line in data.marked(pairs[0], tokenizer).splitlines()))


# -------------------------------------------------------------------------------------- checkpoints and files


def save(policy: Policy, optimizer: torch.optim.Optimizer, out: str, step: int) -> None:
    """A sharded checkpoint, complete or absent; those before are removed after it."""
    folder = os.path.join(out, "checkpoints")
    older = os.listdir(folder) if os.path.isdir(folder) else []
    path = os.path.join(folder, f"step-{step:06d}")
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path + ".tmp")
    if dist.get_rank() == 0:
        os.rename(path + ".tmp", path)
        for name in older:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)  # PATH.tmp of a killed run is gone
    dist.barrier()


def resume(policy: Policy, optimizer: torch.optim.Optimizer, identity: dict[str, Any], out: str) -> int:
    """Load the newest checkpoint and forget the metrics after it. Returns the optimizer steps it has seen.

    Raises InputError if there is none, or if a flag or the data that the result depends on has changed.
    """
    folder, metrics_file = os.path.join(out, "checkpoints"), os.path.join(out, "metrics.jsonl")
    present = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(name for name in present if re.fullmatch(r"step-\d+", name))
    if not names:
        raise InputError(f"--resume: no checkpoint in {folder}; "
                         "start without --resume in another --output-dir")
    with open(os.path.join(out, "run.json")) as file:
        before = json.load(file)
    free = ("resume", "output_dir", "test_problems", "tokens_per_micro_batch", "eval_every", "save_every",
            "share_prefix", "activation_checkpointing", "offload", "compile")
    changed = [f"--{key.replace('_', '-')} {before['config'].get(key)} -> {value}"
               for key, value in identity["config"].items()
               if key not in free and before["config"].get(key) != value]
    changed += [f"content of --{key}" for key, name in (("data", "pairs"), ("model", "weights"))
                if before[name] != identity[name]]
    if changed:
        raise InputError(f"--resume: {out} was started with another {', '.join(changed)}")
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=os.path.join(folder, names[-1]))
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step = int(names[-1].removeprefix("step-"))
    if dist.get_rank() == 0:
        with open(metrics_file) as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] < step]
        write_whole(metrics_file, "".join(lines))
    say(f"resuming    after optimizer step {step}")
    return step


def log(out: str, line: dict[str, float]) -> None:
    if dist.get_rank() == 0:
        with open(os.path.join(out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


# --------------------------------------------------------------------------------- processes and command line


def start_processes() -> torch.device:
    """Join the process group that torchrun describes, or be a group of one. Returns this rank's device."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here "
                         "(CUDA_VISIBLE_DEVICES= hides them and trains on the CPU)")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch._dynamo.config.recompile_limit = 64  # rows have several lengths, with and without gradients
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return device


def kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def parse(arguments: list[str] | None = None) -> Config:
    """Config from the command line; every field is a flag, with hyphens or underscores."""
    parser = argparse.ArgumentParser(
        prog="stepdpo.py", description=__doc__, allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="@FILE reads flags from FILE, written as on the command line; # starts a comment.")
    parser.convert_arg_line_to_args = data.words_of_line
    for field in dataclasses.fields(Config):
        shown = "" if field.default is None or field.type is bool else f" [{field.default}]"
        options = {"default": field.default, "help": field.metadata["help"] + shown}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": field.type, "choices": field.metadata["choices"]}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    try:
        return Config(**vars(parser.parse_args(list(map(data.hyphens, arguments or sys.argv[1:])))))
    except ValueError as error:  # of Config, or an unclosed quotation in @FILE
        parser.error(str(error))


def main() -> None:
    config = parse()
    try:
        train(config)
        if config.test_problems:
            report_accuracy(config)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each node: they may have different files
            print(f"stepdpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Step-DPO: preference optimization on pairs of single reasoning steps (Lai et al. 2024, arXiv:2406.18629).

Given a problem x, correct steps s_1..s_{k-1}, a correct next step s_win and a wrong one s_lose, eq. (2) of the paper is

    L = -E log sigmoid( beta * [ log pi(s_win | x, s_<k)/pi_ref(s_win | x, s_<k) - log pi(s_lose | x, s_<k)/pi_ref(...) ] )

where pi_ref is the model before training. Only the step is trained on: the problem and the steps before it are context.

    python stepdpo.py --model MODEL --data pairs.jsonl --output-dir OUT                          # one process, CPU or GPU
    torchrun --nproc_per_node 8 stepdpo.py --model Qwen/Qwen2-72B-Instruct --data xinlai/Math-Step-DPO-10K --output-dir OUT

Read on: the loss, the policy (a model that returns log-probabilities of steps), its sharding, loading and saving, and the
training loop. data.py says what a pair is and how it becomes tokens; kernels.py, why no logits are ever held.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data import (
    INSTRUCTION,
    SPANS,
    TEMPLATES,
    Batch,
    InputError,
    Pair,
    encode,
    fingerprint,
    marked,
    may_attend,
    pack,
    read_rows,
    schedule,
    split,
)
from kernels import linear_logps


def flag(default: Any, help: str, **options: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Config:
    """Every flag of the command line, with the paper's values as defaults."""

    model: str = flag(None, "model to train: a Hugging Face folder (safetensors) or a hub name")
    data: str = flag(None, "step pairs to train on: .jsonl, .json, .parquet or a hub dataset")
    output_dir: str = flag(None, "folder for metrics.jsonl, run.json, checkpoints/ and the trained model/")
    eval_data: str = flag(None, "held-out step pairs: same metrics, no training")
    reference: str = flag(None, "reference model, if it is not the model itself before training")
    span: str = flag("step", "train on one step, or on the whole solution (plain DPO)", choices=tuple(SPANS))
    template: str = flag("chat", "how prompt and answer are put together", choices=TEMPLATES)
    instruction: str = flag(None, "text added to the problem in the user turn ('' for none; default: the template's own, "
                                  f"which for chat and deepseek-math is: {INSTRUCTION})")
    beta: float = flag(0.4, "strength of the pull towards the reference (paper: 0.4, and 0.5 for 72B)")
    learning_rate: float = flag(5e-7, "peak; linear warm-up, then cosine to 0")
    batch_size: int = flag(128, "pairs per optimizer step, over all ranks (an epoch is cut into equal batches near it)")
    tokens_per_micro_batch: int = flag(4096, "tokens in one forward and backward of one rank; sets the memory, not the result")
    epochs: int = flag(8, "passes over the pairs (paper: 8, and 4 above 30B)")
    max_steps: int = flag(0, "stop (and end the schedule) after so many optimizer steps; 0: after all epochs")
    warmup_ratio: float = flag(0.1, "share of the optimizer steps with rising learning rate")
    max_length: int = flag(1024, "longest prefix + step in tokens; longer pairs are dropped and counted, never truncated")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm")
    eval_every: int = flag(50, "optimizer steps between two looks at --eval-data (also before the first and after the last)")
    save_every: int = flag(0, "optimizer steps between two checkpoints; 0: only when stopped by SIGTERM")
    resume: bool = flag(False, "continue from the checkpoint in --output-dir")
    share_prefix: bool = flag(True, "lay out what chosen and rejected have in common only once")
    activation_checkpointing: bool = flag(True, "keep only each layer's input and compute the rest again: less memory, 1/3 more work")
    offload: bool = flag(False, "keep parameters, gradients and optimizer state in CPU memory")
    compile: bool = flag(False, "torch.compile each decoder layer")
    dtype: str = flag(None, "compute type; master weights stay float32 (default: bfloat16 on CUDA, float32 on CPU)",
                      choices=("bfloat16", "float32"))
    seed: int = flag(0, "order of the pairs")

    def __post_init__(self) -> None:
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} is required")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise InputError(f"--{field.name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("beta", "learning_rate", "batch_size", "tokens_per_micro_batch", "epochs", "max_length",
                     "max_grad_norm", "eval_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name in ("max_steps", "save_every", "warmup_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be 0 or above, got {getattr(self, name)}")


# ------------------------------------------------------------------------------------------------------------ the loss


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


# ---------------------------------------------------------------------------------------------------------- the policy


class Head(nn.Linear):
    """The language-model head. Asked with targets it gives their log-probabilities (T,), and no logits exist."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(hidden) if targets is None else linear_logps(hidden, self.weight, targets)


class Policy(nn.Module):
    """A causal language model that maps a packed batch to the log-probabilities of its trained tokens."""

    def __init__(self, model: nn.Module, share_prefix: bool):
        super().__init__()
        self.model, self.share_prefix = model, share_prefix
        self.config = model.config.get_text_config()
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"):
            if getattr(self.config, name, None) not in (None, 1):
                raise InputError(f"{type(model).__name__} changes its logits ({name} = {getattr(self.config, name)}); "
                                 "training it is not supported, because the loss would not be that of the model")
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            raise InputError(f"{type(model).__name__}: the head must be a plain linear layer without bias, got {head}")
        head.__class__ = Head

    def forward(self, batch: Batch) -> Tensor:
        """(T,) fp32: log-probabilities of the trained tokens, in nats."""
        hidden = self.model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids,
                                       attention_mask=self.attention_mask(batch), use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(hidden[0, batch.predict_at], batch.targets)

    def attention_mask(self, batch: Batch) -> Any:
        """The rule of `data.may_attend` in the form the attention implementation takes (a dict where layers differ)."""
        if not self.share_prefix:
            return None  # transformers takes a position that starts again at 0 for a new document
        window = getattr(self.config, "sliding_window", None)
        if "sliding_attention" not in (getattr(self.config, "layer_types", None) or ()):
            uses_window = window is not None and not hasattr(self.config, "layer_types")
            return self._mask(batch, window if uses_window else None)
        return {"full_attention": self._mask(batch, None), "sliding_attention": self._mask(batch, window)}

    def _mask(self, batch: Batch, window: int | None) -> Any:
        rule, length, device = may_attend(batch, window), batch.input_ids.shape[1], batch.input_ids.device
        if self.config._attn_implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask
            return create_block_mask(rule, 1, None, length, length, device=device)
        index = torch.arange(length, device=device)
        return rule(0, 0, index[:, None], index[None, :])[None, None]  # (1, 1, L, L), True = attend

    def plain_token_logps(self, ids: Tensor, trained: int) -> Tensor:
        """(trained,) fp32: of the last tokens of one plain sequence (L,), by the model's own forward and its logits."""
        logits = self.model(ids[None], use_cache=False, logits_to_keep=trained + 1).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[-trained:, None])[:, 0]


def step_logps(token_logps: Tensor, batch: Batch) -> Tensor:
    """Sum (T,) token log-probabilities by step: (2, B), chosen and rejected."""
    return token_logps.new_zeros(2 * batch.pairs).index_add(0, batch.sequence, token_logps).view(2, batch.pairs)


# ------------------------------------------------------------------------------------------- building, sharding, loading


def build(path: str, config: Config, device: torch.device) -> Policy:
    """The model in folder `path`, sharded over all ranks, in evaluation mode: dropout stays off in training too."""
    hf_config = AutoConfig.from_pretrained(path)
    export_dtype = hf_config.dtype or torch.float32
    attention = "flex_attention" if device.type == "cuda" else "sdpa"
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)
    policy = Policy(model, config.share_prefix).eval()
    policy.export_dtype = export_dtype
    shard(policy, config, device)
    load(policy, path)
    return policy


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters get no memory; buffers (rotary frequencies, which no checkpoint holds) are computed as always."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        known = parameter is None or parameter.is_meta  # being tied: must stay the same object
        register(module, name, parameter if known else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def shard(policy: Policy, config: Config, device: torch.device) -> None:
    """FSDP2: each decoder layer is gathered while it runs; then, if untied, embedding and head; then the rest."""
    model = policy.model
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise InputError(f"{type(model).__name__} does not name its decoder layers (_no_split_modules), so it cannot be sharded")
    dtype = getattr(torch, config.dtype)
    wrap = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy() if config.offload else OffloadPolicy(),
    )
    for layer in layers:
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.compile:
            layer.compile()
        wrap(layer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    if not tied:
        wrap(embedding)
        wrap(head)
    wrap(policy, reshard_after_forward=True)  # else a pass without gradients would leave gathered parameters behind
    home = torch.device("cpu") if config.offload else device
    policy._apply(lambda tensor: torch.empty_like(tensor, device=home) if tensor.is_meta else tensor)
    if tied:
        head.weight = embedding.weight  # _apply has made two of one
    register_fsdp_forward_method(policy, "plain_token_logps")


def checkpoint_files(path: str) -> dict[str, str]:
    """Tensor name -> safetensors file."""
    index, single = os.path.join(path, "model.safetensors.index.json"), os.path.join(path, "model.safetensors")
    if os.path.exists(index):
        with open(index) as file:
            return {name: os.path.join(path, part) for name, part in json.load(file)["weight_map"].items()}
    if not os.path.exists(single):
        raise InputError(f"{path}: has no model.safetensors(.index.json); only safetensors weights are loaded")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def load(policy: Policy, path: str) -> None:
    """Fill the shards: each rank reads only its own rows of each tensor.

    Raises InputError if the checkpoint's tensors are not, one to one, the model's (tied weights may stand once or twice).
    """
    files, names = checkpoint_files(path), {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    persistent = policy.model.state_dict().keys()
    names |= {buffer: [name] for name, buffer in policy.model.named_buffers() if name in persistent}
    found = {tensor: next((n for n in aliases if n in files), None) for tensor, aliases in names.items()}
    missing = [aliases[0] for tensor, aliases in names.items() if found[tensor] is None]
    unused = set(files) - {n for aliases in names.values() for n in aliases}
    unused = {n for n in unused if not n.endswith("inv_freq")}  # older checkpoints store what is computed here
    if missing or unused:
        raise InputError(f"{path}: its tensors are not one to one those of {type(policy.model).__name__}, which is not "
                         f"supported (missing: {missing[:3]}, left over: {sorted(unused)[:3]})")
    opened: dict[str, Any] = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for tensor, name in tqdm(found.items(), desc="loading", unit="tensor", disable=rank != 0, leave=False):
        file = files[name]
        if file not in opened:
            opened = {file: safe_open(file, "pt")}
        rows = opened[file].get_slice(name)
        if tuple(rows.get_shape()) != tuple(tensor.shape):
            raise InputError(f"{file}: {name} must have shape {tuple(tensor.shape)}, got {tuple(rows.get_shape())}")
        with torch.no_grad():
            if isinstance(tensor, DTensor):
                chunk = -(-tensor.shape[0] // ranks)  # Shard(0) cuts like torch.chunk
                tensor.to_local().copy_(rows[min(rank * chunk, len(tensor)):(rank + 1) * chunk])
            else:
                tensor.copy_(rows[...])


def export(policy: Policy, source: str, path: str, shard_bytes: int = 5 * 10**9) -> None:
    """Write an ordinary Hugging Face folder, in the dtype the model came in; complete or absent, never half."""
    names = {parameter: name for name, parameter in reversed(list(policy.model.state_dict(keep_vars=True).items()))}
    itemsize, sizes, parts = policy.export_dtype.itemsize, [0], [[]]
    for tensor in reversed(names):
        if sizes[-1] + tensor.numel() * itemsize > shard_bytes and parts[-1]:
            sizes, parts = sizes + [0], parts + [[]]
        sizes[-1] += tensor.numel() * itemsize
        parts[-1].append(tensor)
    if dist.get_rank() == 0:
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        os.makedirs(path + ".tmp")
    weight_map = {}
    for i, part in enumerate(tqdm(parts, desc="exporting", unit="file", disable=dist.get_rank() != 0, leave=False), 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        whole = {}
        for tensor in part:
            full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
            if dist.get_rank() == 0:  # the others only take part in the gathering
                whole[names[tensor]] = full.to("cpu", policy.export_dtype).contiguous()
        weight_map |= dict.fromkeys(whole, file)
        if dist.get_rank() == 0:
            save_file(whole, os.path.join(path + ".tmp", file), metadata={"format": "pt"})
    if dist.get_rank() == 0:
        if len(parts) > 1:
            write_json(os.path.join(path + ".tmp", "model.safetensors.index.json"),
                       {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
        for file in os.listdir(source):  # configuration, tokenizer, chat template: byte for byte
            if file.endswith((".json", ".jinja", ".txt", ".model")) and not file.endswith(".index.json"):
                shutil.copy(os.path.join(source, file), path + ".tmp")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(path + ".tmp", path)
    dist.barrier()


def write_json(path: str, content: Any) -> None:
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


def resolve(name: str) -> str:
    """A local folder, or the hub model of that name brought to this machine."""
    if os.path.isdir(name):
        return name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(f"{name}: no such folder (a hub model is called owner/name)")
    from huggingface_hub import snapshot_download
    fetch = partial(snapshot_download, name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            fetch()
        dist.barrier()
        return fetch(local_files_only=True)
    except Exception as error:  # the hub's client has its own large family of errors
        raise InputError(f"{name}: not a folder here, and not to be had from the hub ({error})") from None


# ------------------------------------------------------------------------------------- log-probabilities of many pairs


def micro_batches(pairs: Sequence[Pair], indices: Sequence[int], config: Config, device: torch.device,
                  desc: str | None = None) -> Iterator[tuple[list[int], Batch]]:
    """This rank's micro-batches of one global batch, with the indices of their pairs; as many as every other rank has.

    On CUDA a row is padded to a multiple of an eighth of the budget: each new length costs a compilation of the attention.
    """
    lengths = [pairs[i].tokens(config.share_prefix) for i in indices]
    multiple = -(-config.tokens_per_micro_batch // 1024) * 128 if device.type == "cuda" else 1
    plan = split(lengths, dist.get_world_size(), config.tokens_per_micro_batch)
    for ranks in tqdm(plan, desc=desc, unit="batch", disable=desc is None or dist.get_rank() != 0, leave=False):
        mine = [int(indices[j]) for j in ranks[dist.get_rank()]]
        yield mine, pack([pairs[i] for i in mine], config.share_prefix, multiple).to(device)


@torch.no_grad()
def all_logps(policy: Policy, pairs: Sequence[Pair], config: Config, device: torch.device, desc: str) -> Tensor:
    """(2, N) fp32 on every rank: log-probabilities of the chosen and rejected steps of all pairs, in nats."""
    logps = torch.zeros(2, len(pairs), device=device)
    for mine, batch in micro_batches(pairs, range(len(pairs)), config, device, desc):
        logps[:, mine] = step_logps(policy(batch), batch)
    dist.all_reduce(logps)  # every pair was filled in by one rank
    return logps


@torch.no_grad()
def self_check(policy: Policy, pairs: Sequence[Pair], config: Config, device: torch.device) -> float:
    """Packed log-probabilities of two pairs against the model's own logits on four plain sequences.

    Masks fail silently: `eager` attention adds a boolean mask to the scores, others ignore it. Returns the mean difference
    in nats per token; raises InputError if it is more than rounding.
    """
    order = sorted(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    sample = [order[-1], order[0]]
    packed = policy(pack(sample, config.share_prefix).to(device))
    alone = [policy.plain_token_logps(torch.tensor(pair.prefix + step, device=device), len(step))
             for pair in sample for step in (pair.chosen, pair.rejected)]
    difference = (packed - torch.cat(alone)).abs().mean().item()
    allowed = 1e-4 if config.dtype == "float32" else 0.1  # bf16 rounds the plain logits to 0.02-0.04 nats
    if not difference <= allowed:
        name, attention = type(policy.model).__name__, policy.config._attn_implementation
        raise InputError(f"{name} with {attention} attention: packed log-probabilities differ from plain ones by "
                         f"{difference:.2g} nats per token (allowed: {allowed:g}), so it does not follow the packed mask; "
                         + ("use --no-share-prefix" if config.share_prefix else "this model cannot be trained here"))
    return difference


def reference_logps(policy: Policy, path: str, sets: dict[str, list[Pair]], config: Config,
                    device: torch.device) -> dict[str, Tensor]:
    """(2, N) reference log-probabilities of each set of pairs, from the cache if they were computed before.

    The cache ($STEPDPO_CACHE, default ~/.cache/stepdpo) is keyed by a hash of the model's files, the token ids and all that
    changes the arithmetic, so it is never wrong, only absent.
    """
    folder = os.environ.get("STEPDPO_CACHE") or os.path.expanduser("~/.cache/stepdpo")
    result = {}
    for name, pairs in sets.items():
        key = [model_fingerprint(path), fingerprint(pairs), config.dtype, str(config.share_prefix), device.type,
               torch.__version__, transformers.__version__]
        file = os.path.join(folder, hashlib.sha256("\n".join(key).encode()).hexdigest()[:32] + ".safetensors")
        cached = [os.path.exists(file)]
        dist.broadcast_object_list(cached)  # rank 0 decides: another node may have another disk
        if cached[0]:
            logps = load_file(file)["logps"].to(device) if dist.get_rank() == 0 else torch.empty(2, len(pairs), device=device)
            dist.broadcast(logps, 0)
            say(f"reference   {name} log-probabilities from {file}")
        else:
            logps = all_logps(policy, pairs, config, device, f"reference ({name})")
            if dist.get_rank() == 0:
                os.makedirs(folder, exist_ok=True)
                save_file({"logps": logps.cpu()}, f"{file}.{os.getpid()}.tmp")
                os.replace(f"{file}.{os.getpid()}.tmp", file)
            say(f"reference   {name} log-probabilities computed, kept in {file}")
        result[name] = logps
    return result


def model_fingerprint(path: str) -> str:
    """Hash of config and weight files: name, size, time and 64 samples of 4 KiB each (all of 72B would take minutes)."""
    digest = hashlib.sha256()
    for file in [os.path.join(path, "config.json"), *sorted(set(checkpoint_files(path).values()))]:
        status = os.stat(file)
        digest.update(f"{os.path.basename(file)} {status.st_size} {status.st_mtime_ns}\n".encode())
        with open(file, "rb") as content:
            for i in range(64):
                content.seek(status.st_size * i // 64)
                digest.update(content.read(4096))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- the training

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


def loss_and_metrics(logps: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """From (2, B) policy and reference log-probabilities: the summed loss and the sums of METRICS, (7,) fp64."""
    losses, chosen, rejected = step_dpo_loss(*logps, *reference, beta)
    each = torch.stack([losses.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float(), *logps.detach()])
    return losses.sum(), each.double().sum(1)


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Linear warm-up, then cosine to 0. Unlike Hugging Face's schedule the first step is not wasted on a rate of 0."""
    warmup = math.ceil(config.warmup_ratio * steps - 1e-9)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(config: Config) -> None:
    """The whole run: read, load, reference log-probabilities, self-check, optimizer steps, export. Collective."""
    device = start_processes()
    config = dataclasses.replace(config, dtype=config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    world, out = dist.get_world_size(), config.output_dir
    run_file, metrics_file = os.path.join(out, "run.json"), os.path.join(out, "metrics.jsonl")
    if os.path.exists(metrics_file) and not config.resume:
        raise InputError(f"{out}: already holds a run; continue it with --resume, or choose another --output-dir")

    path = resolve(config.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    sets, dropped = {}, {}
    for name, source in (("train", config.data), ("eval", config.eval_data)):
        if source:
            sets[name], dropped[name] = encode(read_rows(source), tokenizer, config.template,
                                                    config.instruction, config.span, config.max_length)
    pairs, held_out = sets["train"], sets.get("eval", [])
    for pair in pairs + held_out:
        if pair.tokens(config.share_prefix) > config.tokens_per_micro_batch:
            raise InputError(f"{pair.where}: takes {pair.tokens(config.share_prefix)} tokens, more than "
                             f"--tokens-per-micro-batch {config.tokens_per_micro_batch}; raise that or lower --max-length")
    plan = schedule(len(pairs), config.batch_size, config.epochs, config.seed)
    steps = min(len(plan), config.max_steps or len(plan))

    reference_path = resolve(config.reference) if config.reference else path
    if config.reference and AutoTokenizer.from_pretrained(reference_path).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--reference {config.reference}: its vocabulary is not that of {config.model}")
    policy = build(reference_path, config, device)
    describe(policy, config, device, tokenizer, sets, dropped, plan, steps)
    say(f"self-check  packed and plain log-probabilities differ by "
        f"{self_check(policy, pairs, config, device):.1e} nats per token")
    reference = reference_logps(policy, reference_path, sets, config, device)
    if config.reference:
        del policy
        policy = build(path, config, device)
        self_check(policy, pairs, config, device)

    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    identity = {"config": dataclasses.asdict(config), "pairs": fingerprint(pairs)}
    first = resume(policy, optimizer, config, identity, run_file, metrics_file) if config.resume else 0
    if dist.get_rank() == 0:
        os.makedirs(out, exist_ok=True)
        versions = {m.__name__: m.__version__ for m in (torch, triton, transformers, safetensors, numpy)}
        write_json(run_file, {**identity, "optimizer_steps": steps, "processes": world, "device": device_name(device),
                              "python": sys.version.split()[0], "versions": versions,
                              "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def evaluate(step: int) -> None:
        logps = all_logps(policy, held_out, config, device, "eval")
        values = loss_and_metrics(logps, reference["eval"], config.beta)[1] / len(held_out)
        log({"step": step, **{f"eval/{name}": value for name, value in zip(METRICS, values.tolist())}})

    def log(line: dict[str, float]) -> None:
        if dist.get_rank() == 0:
            with open(metrics_file, "a") as file:
                file.write(json.dumps(line) + "\n")
        if "eval/loss" in line:
            say(f"step {line['step']:4d}   held-out loss {line['eval/loss']:.4f}, margin {line['eval/rewards/margins']:+.4f}, "
                f"accuracy {line['eval/rewards/accuracies']:.1%}")

    stop_asked = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(True))  # a preempted job: finish the step and save
    began, seen = time.time(), 0
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="training", unit="step", disable=dist.get_rank() != 0)
    for step in bar:
        if held_out and step % config.eval_every == 0 and (step > first or step == 0):
            evaluate(step)
        step_began, indices = time.time(), plan[step]
        sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)
        for mine, batch in micro_batches(pairs, indices, config, device):
            logps = step_logps(policy(batch), batch)
            loss, metrics = loss_and_metrics(logps, reference["train"][:, mine], config.beta)
            (loss * world / len(indices)).backward()  # FSDP takes the mean over ranks; the loss is that over pairs
            sums[:-2] += metrics
            sums[-2] += batch.tokens
        sums[-1] = len(stop_asked)
        dist.all_reduce(sums)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        *means, tokens, stop = (sums / sums.new_tensor([len(indices)] * len(METRICS) + [1, 1])).tolist()
        if not math.isfinite(norm) or not math.isfinite(means[0]):
            raise InputError(f"step {step}: loss {means[0]}, gradient norm {norm}; nothing was updated. Lower "
                             "--learning-rate, or look at these pairs: " + ", ".join(pairs[i].where for i in indices[:5]))
        rate = learning_rate(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.time() - step_began
        seen += len(indices)
        line = {"step": step, **dict(zip(METRICS, means)), "grad_norm": norm, "lr": rate,
                "tokens_per_second": tokens / seconds, "pairs_per_second": len(indices) / seconds}
        if device.type == "cuda":
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        log(line)
        bar.set_postfix_str(f"loss {line['loss']:.4f}, margin {line['rewards/margins']:+.4f}, "
                            f"accuracy {line['rewards/accuracies']:.0%}, {line['pairs_per_second']:.1f} pairs/s")
        done = step + 1
        if done < steps and (stop or config.save_every and done % config.save_every == 0):
            save(policy, optimizer, out, done)
        if stop and done < steps:
            bar.close()
            say(f"stopped     after optimizer step {done} of {steps}; the same command with --resume continues")
            sys.exit(128 + signal.SIGTERM)
    bar.close()
    if held_out and first < steps:
        evaluate(steps)
    export(policy, path, os.path.join(out, "model"))
    seconds = time.time() - began
    say(f"finished    {steps - first} optimizer steps, {seen} pairs in {seconds / 60:.1f} min ({seen / seconds:.2f} pairs/s)\n"
        f"            metrics in {metrics_file}, model in {os.path.join(out, 'model')}")


def describe(policy: Policy, config: Config, device: torch.device, tokenizer: Any, sets: dict[str, list[Pair]],
             dropped: dict[str, list[str]], plan: list, steps: int) -> None:
    """Print what will happen, so that a wrong template or a lost half of the data is seen before hours are spent."""
    pairs = sets["train"]
    mean = [sum(len(pair[k]) for pair in pairs) / len(pairs) for k in range(3)]
    saved = 1 - sum(p.tokens(True) for p in pairs) / sum(p.tokens(False) for p in pairs)
    parameters = sum(p.numel() for p in policy.parameters())
    say(f"model       {config.model}: {type(policy.model).__name__}, {parameters / 1e6:,.1f}M parameters, "
        f"{policy.config._attn_implementation} attention\n"
        f"processes   {dist.get_world_size()} x {device_name(device)}, compute in {config.dtype}, master weights in float32")
    for name, chosen in sets.items():
        lost = dropped[name]
        say(f"{name:11s} {len(chosen):,} pairs, {len(lost):,} dropped as longer than --max-length {config.max_length}"
            + (f" (first: {', '.join(lost[:3])})" if lost else ""))
    say(f"lengths     prefix {mean[0]:.0f}, chosen {mean[1]:.0f}, rejected {mean[2]:.0f} tokens in the mean; "
        f"sharing the prefix {'saves' if config.share_prefix else 'would save'} {saved:.0%} of all tokens\n"
        f"steps       {steps} optimizer steps of {len(plan[0])} pairs, {len(plan) // config.epochs} to an epoch\n"
        f"example     {pairs[0].where}, the trained tokens in [[...]]:\n"
        + "\n".join("    | " + line for line in marked(pairs[0], tokenizer).splitlines()))


def save(policy: Policy, optimizer: torch.optim.Optimizer, out: str, step: int) -> None:
    """A sharded checkpoint, complete or absent; the one before is removed after."""
    folder = os.path.join(out, "checkpoints")
    path = os.path.join(folder, f"step-{step:06d}")
    older = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    dist.barrier()
    weights, moments = get_state_dict(policy, optimizer)
    dcp.save({"policy": weights, "optimizer": moments}, checkpoint_id=path + ".tmp")
    if dist.get_rank() == 0:
        os.rename(path + ".tmp", path)
        for folder in older:
            shutil.rmtree(folder)
    dist.barrier()


def resume(policy: Policy, optimizer: torch.optim.Optimizer, config: Config, identity: dict[str, Any], run_file: str,
           metrics_file: str) -> int:
    """Load the newest checkpoint and forget the metrics after it. Returns the number of optimizer steps it has seen.

    Raises InputError if there is none, or if a flag or the data that the result depends on has changed.
    """
    folder = os.path.join(config.output_dir, "checkpoints")
    steps = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else ()) if not name.endswith(".tmp"))
    if not steps:
        raise InputError(f"--resume: no checkpoint in {folder}; start without --resume, in another --output-dir")
    with open(run_file) as file:
        before = json.load(file)
    free = {"resume", "output_dir", "tokens_per_micro_batch", "eval_every", "save_every", "share_prefix",
            "activation_checkpointing", "offload", "compile"}
    changed = [f"--{name.replace('_', '-')} {before['config'].get(name)} -> {value}"
               for name, value in identity["config"].items() if name not in free and before["config"].get(name) != value]
    if before["pairs"] != identity["pairs"]:
        changed.append(f"the pairs in {config.data}")
    if changed:
        raise InputError(f"--resume: not the same run as {run_file}: {'; '.join(changed)}")
    weights, moments = get_state_dict(policy, optimizer)
    state = {"policy": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=os.path.join(folder, steps[-1]))
    set_state_dict(policy, optimizer, model_state_dict=state["policy"], optim_state_dict=state["optimizer"])
    step = int(steps[-1].removeprefix("step-"))
    if dist.get_rank() == 0:
        with open(metrics_file) as file:
            lines = [line for line in file if line.endswith("\n") and
                     json.loads(line)["step"] < step + ("eval/loss" in line)]
        with open(metrics_file + ".tmp", "w") as file:
            file.writelines(lines)
        os.replace(metrics_file + ".tmp", metrics_file)
    say(f"resuming    after optimizer step {step}")
    return step


# ------------------------------------------------------------------------------------------------------- the processes


def start_processes() -> torch.device:
    """Join the process group that torchrun describes, or be a group of one. Returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch._dynamo.config.recompile_limit = 64  # rows come in a few lengths, each with and without gradients
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def say(text: str) -> None:
    if dist.get_rank() == 0:
        tqdm.write(text)


def parse(arguments: list[str] | None = None) -> Config:
    """Config from the command line; every field is a flag, with hyphens or underscores."""
    parser = argparse.ArgumentParser(
        prog="stepdpo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        fromfile_prefix_chars="@", epilog="@FILE reads flags from FILE, as on the command line; # starts a comment.")
    parser.convert_arg_line_to_args = lambda line: [hyphens(a) for a in shlex.split(line, comments=True)]
    for field in dataclasses.fields(Config):
        options = dict(default=field.default, help=field.metadata["help"], choices=field.metadata.get("choices"))
        if field.default not in (None, ""):
            options["help"] += f" [{field.default}]"
        if field.type is bool:
            options = dict(options, action=argparse.BooleanOptionalAction)
            del options["choices"]
        else:
            options["type"] = field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    namespace = parser.parse_args([hyphens(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    try:
        return Config(**vars(namespace))
    except InputError as error:
        parser.error(str(error))


def hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def main() -> None:
    config = parse()
    try:
        train(config)
    except InputError as error:
        if dist.get_rank() == 0:
            print(f"stepdpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

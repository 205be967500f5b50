"""What a run does before it trains: join the other processes, read and check its input, say what will happen.

Whatever cannot be trained exactly is refused here, before hours are spent.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import data
from data import Pair
from runtime import architectures, outputs, rows, templates, weights
from runtime.commands import joining, local_processes, local_rank, waiting_for_disks
from runtime.gathering import smallest_memory, with_gathering
from runtime.messages import InputError, print0

# -------------------------------------------------------------------------------------------------- processes


def start_processes(minutes: float = 30) -> None:
    """Join the process group that torchrun describes, or be a group of one."""
    cuda, rank_here = torch.cuda.is_available(), local_rank()
    use_cores_and_memory_well()
    if cuda and rank_here >= torch.cuda.device_count():
        raise InputError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the GPUs here "
                         "(CUDA_VISIBLE_DEVICES= hides them and trains on the CPU)")
    if cuda:
        torch.cuda.set_device(rank_here)
    # gloo too on CUDA: with --offload all the gradients, whose norm is needed, are in CPU memory.
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        with joining():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                    timeout=timedelta(minutes=minutes), **alone)


def use_cores_and_memory_well() -> None:
    """Set what torch could have better defaults for."""
    # torchrun gives each process one thread, unless told otherwise.
    if os.environ.get("OMP_NUM_THREADS") == "1" and local_processes() > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))
    # Batches have all lengths, and blocks of fixed size would leave holes. Page-locked host memory would be
    # rounded up to powers of two: by 72% for the embedding of Qwen2-72B on 8 GPUs.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        settings = "expandable_segments:True,pinned_max_round_threshold_mb:1"
        os.environ.setdefault("PYTORCH_ALLOC_CONF", settings)


def local_device() -> torch.device:
    """The device of this rank, as `start_processes` has set it."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def mesh_of_ranks(shard_size: int | None) -> DeviceMesh:
    """All ranks share one copy of the model, or each `shard_size` neighbours one: FSDP then gathers layers
    among these, and only the gradients' sums go further."""
    ranks, device = dist.get_world_size(), local_device().type
    if shard_size in (None, ranks):
        return init_device_mesh(device, (ranks,))
    if ranks % shard_size:
        raise InputError(f"--shard-size {shard_size}: must divide the number of processes, {ranks}")
    return init_device_mesh(device, (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


# ------------------------------------------------------------------------------------------ reading, checking


class Run(NamedTuple):
    """All that a run knows before it reads a weight."""

    config: Namespace         # the flags, with the defaults that depend on the pairs filled in
    folder: str               # of the model
    reference_folder: str     # of the reference: the same, but with --reference
    tokenizer: Any
    pairs: list[Pair]
    held_out: list[Pair]
    steps: int                # optimizer steps
    identity: dict[str, Any]  # what the result depends on, for --resume


def prepare(config: Namespace) -> Run | None:
    """Read and check the input of a run. None if --resume finds it finished. Collective.

    Where the chat template prints today's date, that is filled into `config.template_args`, the caller's too,
    because --test-problems are answered with the same.
    Raises InputError for whatever cannot be trained.
    """
    folder = weights.resolve(config.model)
    weights.check_config(folder)
    if config.test_problems:
        refuse_model_that_no_process_holds(folder, config)
    tokenizer = templates.read_tokenizer(folder)
    before = outputs.recorded_flag("template_args", config.output_dir)
    config.template_args = templates.with_date(config.template_args, tokenizer, config.template, before)
    with waiting_for_disks():  # each rank reads by itself, and downloads what the hub has
        pairs, held_out = rows.read_pairs(tokenizer, config)

    reference_folder = weights.resolve(config.reference) if config.reference else folder
    fingerprints = rows.fingerprint(pairs), rows.fingerprint(held_out)
    identity = outputs.identity_of(folder, reference_folder, *fingerprints, config)
    outputs.refuse_other_nodes(identity, config)
    outputs.refuse_changes(identity, config.output_dir)
    if outputs.is_finished(config.output_dir):
        print0(f"finished    already: {config.output_dir}/model")
        return None
    outputs.refuse_full_disk(folder, config)
    config = with_budget(config, pairs + held_out, local_device().type == "cuda")
    config = with_gathering(config, folder, pairs, smallest_memory())
    steps = config.epochs * data.steps_per_epoch(len(pairs), config.batch_size)
    steps = min(steps, config.max_steps or steps)

    if config.reference and templates.read_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--reference {config.reference}: its vocabulary is not that of {config.model}")
    return Run(config, folder, reference_folder, tokenizer, pairs, held_out, steps, identity)


def refuse_model_that_no_process_holds(folder: str, config: Namespace) -> None:
    """Raise InputError if a process cannot hold the model, as --test-problems has each of them do."""
    needed = weights.count_parameters(folder) * getattr(torch, config.dtype).itemsize
    if local_device().type == "cuda":
        room = torch.cuda.get_device_properties(local_device()).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_processes()
    if needed > 0.9 * room:
        raise InputError(
            f"--test-problems: each process would hold the model, {needed / 1e9:,.0f} GB, and has "
            f"{room / 1e9:,.0f} GB. Leave it away, and ask a server before and after: vllm serve MODEL; "
            f"python -m pairs solve --server http://localhost:8000 --model MODEL --problems "
            f"{config.test_problems} --samples 1 --temperature 0 --out ANSWERS")


def with_budget(config: Namespace, pairs: Sequence[Pair], cuda: bool) -> Namespace:
    """The flags, with a default for --tokens-per-micro-batch. Raises InputError if a pair exceeds it."""
    longest = max(pairs, key=lambda pair: pair.tokens(config.share_prefix))
    needed = longest.tokens(config.share_prefix)
    usual = 8192 if cuda else 1024
    if config.offload == "all":
        usual *= 2  # every micro-batch brings all weights up, and all gradients down
    budget = config.tokens_per_micro_batch or max(needed, usual)
    if needed > budget:
        raise InputError(f"{longest.where}: takes {needed} tokens, more than --tokens-per-micro-batch "
                         f"{budget}; raise that or lower --max-length")
    return Namespace(**{**vars(config), "tokens_per_micro_batch": budget})


# ---------------------------------------------------------------------------------- what will happen, and how


def describe(policy: nn.Module, run: Run) -> None:
    """Say what will happen, so that a wrong template is seen before hours are spent."""
    config, pairs = run.config, run.pairs
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    prefix, chosen, rejected = (sum(len(pair[i]) for pair in pairs) / len(pairs) for i in range(3))
    saved = prefix / (2 * prefix + chosen + rejected)
    per_step = len(pairs) / data.steps_per_epoch(len(pairs), config.batch_size)
    saves = "saves" if config.share_prefix else "would save"
    print0(f"model       {config.model}: {policy.name}, {parameters / 1e6:,.1f}M parameters",
           f"processes   {dist.get_world_size()} x {outputs.device_name()}, CPU threads of each: "
           f"{torch.get_num_threads()}; compute in {config.dtype}, master weights in float32",
           f"lengths     prefix {prefix:.0f}, chosen {chosen:.0f}, rejected {rejected:.0f} tokens on "
           f"average; sharing the prefix {saves} {saved:.0%} of all tokens",
           f"steps       {run.steps} optimizer steps of about {per_step:.0f} pairs, "
           f"{config.tokens_per_micro_batch} tokens per micro-batch",
           f"example     {pairs[0].where}, the trained tokens in [[...]]:",
           *(f"    | {line}" for line in data.marked_text(pairs[0], run.tokenizer).splitlines()))


@torch.no_grad()
def self_check(policy: nn.Module, folder: str, run: Run) -> None:
    """Packed log-probabilities of two pairs against the model's own on their four plain sequences.

    Attention that does not keep to the segments would otherwise be silent. Raises InputError if one of the
    four differs by more than rounding, and if the tokenizer is another model's.
    """
    refuse_tokens_without_place(policy, folder, run.pairs + run.held_out)
    share_prefix = run.config.share_prefix
    by_length = sorted(run.pairs, key=lambda pair: pair.tokens(share_prefix))
    sample = [by_length[-1], by_length[0]]  # the longest meets the windows; two show that pairs are separate

    with weights.reading(folder):  # what the model says if it cannot run on the library's attention
        packed = policy(data.pack(sample, share_prefix).to(local_device()))  # (2, 2)
        differences = []
        for pair, logps in zip(sample, packed.T, strict=True):
            for span, logp in zip((pair.chosen, pair.rejected), logps, strict=True):
                differences.append((logp - policy.library_logp(pair.prefix, span)).abs() / len(span))
    worst = torch.stack(differences).max().item()  # NaN if one is

    # bf16 logits alone are off by 0.02-0.04. Where experts are nearly tied, rounding chooses between them:
    # random mixtures differed by up to 0.16, dense models by 0.024; spans that see each other, by 0.4 to 1.8.
    allowed = 0.3 if architectures.is_mixture(policy.model) else 0.1
    if run.config.dtype == "float32":
        allowed = 1e-3
    if not worst <= allowed:
        raise InputError(f"{policy.name}: packed log-probabilities differ from plain ones by {worst:.2g} "
                         f"nats per token (allowed: {allowed:g}), so it cannot be trained here")
    print0(f"self-check  packed and plain log-probabilities differ by {worst:.1e} nats per token")


def refuse_tokens_without_place(policy: nn.Module, folder: str, pairs: list[Pair]) -> None:
    """Raise InputError if a pair has a token or a position that the model has not."""
    # An index out of range is a device assert on CUDA, and no message.
    embeddings = policy.model.get_input_embeddings().num_embeddings
    limit = architectures.position_limit(policy.model)
    for pair in pairs:
        length = len(pair.prefix) + max(len(pair.chosen), len(pair.rejected))
        if length > limit:
            raise InputError(f"{pair.where}: has {length} tokens, but {policy.name} has no positions beyond "
                             f"{limit}, or computes them in another way; use --max-length {limit}")
        largest = max(pair.prefix + pair.chosen + pair.rejected)
        if largest >= embeddings:
            raise InputError(f"{pair.where}: has token {largest}, but {folder} has {embeddings} embeddings; "
                             "its tokenizer belongs to another model")

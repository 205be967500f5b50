"""Micro-batches without copies: layers are gathered, and gradients reduced, once in an optimizer step.

FSDP lets go of each layer after its forward and its backward, and reduces its gradients in every micro-batch.
On one GPU that is no communication, but still two casts of all weights to bf16, about 10 bytes per parameter
each, and a reduction of 26 bytes. What is kept instead takes 2 bytes per parameter of the whole model for the
gathered layers, and 4 for each rank's own sums, on every GPU.
"""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule

from data import Pair
from runtime.messages import in_one_line, print0

T = TypeVar("T")


def gathered_once(policy: FSDPModule, micro_batches: Iterable[T], config: Namespace) -> Iterator[T]:
    """The micro-batches of an optimizer step; with --gather-once, FSDP keeps between them what it gathered.

    Each layer is gathered in the first forward. Each rank adds up its own whole gradients, in fp32; in the
    last backward FSDP reduces these sums, and frees the layers. With one rank the sums are to the last bit
    those of reducing each micro-batch; with several they are added in another order.
    """
    if not config.gather_once:
        yield from micro_batches
        return
    policy.set_reshard_after_forward(False)
    micro_batches = iter(micro_batches)
    now = next(micro_batches)
    for following in micro_batches:
        keep(policy, True)
        yield now
        now = following
    keep(policy, False)
    yield now
    policy.set_reshard_after_forward(True)  # else a pass without gradients would leave all layers gathered


def keep(policy: FSDPModule, more_to_come: bool) -> None:
    policy.set_reshard_after_backward(not more_to_come)
    policy.set_requires_gradient_sync(not more_to_come)


def with_gathering(config: Namespace, folder: str, pairs: Sequence[Pair], memory: float | None) -> Namespace:
    """The flags, with a default for --gather-once: yes where it fits a GPU of so many bytes. None is no GPU.

    What fits is said by the arithmetic of bench/plan.py. All ranks must ask with the same `memory`.
    """
    if config.gather_once is not None:
        return config
    once, each = (Namespace(**{**vars(config), "gather_once": choice}) for choice in (True, False))
    if memory is None:
        return each

    from runtime.planning import Planner  # takes seconds
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        plan = Planner(hf_config, pairs, dist.get_world_size()).plan(once)
    except Exception as error:  # it runs a layer on fake tensors, and a model that cannot do so may train
        print0(f"gathering   in every micro-batch, as no plan could be made ({in_one_line(error)})")
        return each

    fits = plan.fits(memory)
    how = "once in an optimizer step, which" if fits else "in every micro-batch: once in an optimizer step"
    print0(f"gathering   {how} takes {plan.bytes / 1e9:.1f} GB of {memory / 1e9:.1f} by plan (--gather-once)")
    return once if fits else each


def smallest_memory() -> float | None:
    """Bytes of the smallest GPU of all ranks, or None without GPUs. Collective."""
    if not torch.cuda.is_available():
        return None
    memory = torch.tensor(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return memory.item()

"""Micro-batches without copies: layers are gathered, and gradients reduced, once in an optimizer step.

FSDP lets go of each layer after its forward and its backward, and reduces its gradients in every micro-batch.
On one GPU that is no communication, but still two casts of all weights to bf16, about 10 bytes per parameter
each, and a reduction of 26 bytes. What is kept instead takes 2 bytes per parameter of the whole model for
the gathered layers (4 in float32), and 4 for each rank's own sums, on every GPU.
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
    those of reducing each micro-batch; with several, added in another order, they are equal up to rounding.
    """
    if not config.gather_once:
        yield from micro_batches
        return
    policy.set_reshard_after_forward(False)
    micro_batches = iter(micro_batches)
    now = next(micro_batches)
    for following in micro_batches:
        hold(policy, True)
        yield now
        now = following
    hold(policy, False)
    yield now
    policy.set_reshard_after_forward(True)  # else a pass without gradients would leave all layers gathered


def hold(policy: FSDPModule, more_to_come: bool) -> None:
    """Let the next backward leave layers gathered and gradients unreduced, if more micro-batches come."""
    policy.set_reshard_after_backward(not more_to_come)
    policy.set_requires_gradient_sync(not more_to_come)


def with_gathering(config: Namespace, folder: str, pairs: Sequence[Pair], memory: float | None) -> Namespace:
    """The flags, with a default for --gather-once: yes where it fits GPUs of so many bytes. None is no GPU.

    Collective: the first rank decides for all, because they must reduce at the same time.
    """
    if config.gather_once is not None:
        return config
    choice = [memory is not None and dist.get_rank() == 0 and fits(config, folder, pairs, memory)]
    dist.broadcast_object_list(choice)
    return Namespace(**{**vars(config), "gather_once": choice[0]})


def fits(config: Namespace, folder: str, pairs: Sequence[Pair], memory: float) -> bool:
    """Whether --gather-once fits, by the arithmetic of bench/plan.py. Says so."""
    from runtime.planning import Planner  # takes seconds
    once = Namespace(**{**vars(config), "gather_once": True})
    try:
        hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        plan = Planner(hf_config, pairs, dist.get_world_size()).plan(once)
    except Exception as error:  # it runs a layer on fake tensors, and a model that cannot do so may train
        print0(f"gathering   in every micro-batch, as no plan could be made ({in_one_line(error)})")
        return False
    of = f"{plan.bytes / 1e9:.1f} GB, with reserves {plan.needs / 1e9:.1f}, of {memory / 1e9:.1f} GB"
    if plan.fits(memory):
        print0(f"gathering   once in an optimizer step, which takes {of} by plan")
    else:
        print0(f"gathering   in every micro-batch, as once in an optimizer step takes {of} by plan; "
               "--gather-once does it all the same")
    return plan.fits(memory)


def smallest_memory() -> float | None:
    """Bytes of the smallest GPU of all ranks, or None without GPUs. Collective."""
    if not torch.cuda.is_available():
        return None
    memory = torch.tensor(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return memory.item()

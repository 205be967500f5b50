"""AdamW with its tensors in host memory, for models that are larger than the memory of the GPUs.

Of the 16 bytes per parameter that training with fp32 AdamW takes, a step needs few at a time:

                    bytes    on the GPU    needed there
    weights             4    4 4 4 -       in every forward and backward, but as gathered bf16 layers
    gradients           4    4 4 - -       when a layer's backward has made them, and for the update
    two moments         8    8 - - -       for the update
    --offload                | | | all
                             | | gradients
                             | moments
                             (none)

What stays in host memory visits the GPU for its update, one parameter after the other, and torch's own
fused AdamW does the arithmetic there: to the last bit the result is that of `torch.optim.AdamW(fused=True)`.
Two streams take turns, so that one parameter goes up while another comes down. For 72.7B parameters on 8 GPUs
the moments are 73 GB each way per GPU and optimizer step: seconds, at PCIe's 25 to 50 GB/s.

Where the weights are in host memory too (`all`), FSDP2's CPUOffloadPolicy brings layers up and gradients
down. On a machine without a GPU nothing moves, and the same code runs.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


def on_host(tensor: Tensor) -> Tensor:
    """Zeros like it in host memory, page-locked where a GPU shall read and write them by itself."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=torch.cuda.is_available())


class ShardedAdamW(torch.optim.AdamW):
    """AdamW for parameters that FSDP has sharded."""

    def clip_grad_norm(self, limit: float) -> DTensor:
        """Scale the gradients so that their norm is at most `limit`. Returns what it was, over all shards."""
        return nn.utils.clip_grad_norm_(self.param_groups[0]["params"], limit)


class HostAdamW(ShardedAdamW):
    """AdamW for sharded parameters, with its moments, and if wanted the gradients, in host memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], **options):
        super().__init__(parameters, **options)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()] if cuda else []
        # With `take_gradients`: this rank's shards of them, summed over the micro-batches so far, ...
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.norms: dict[nn.Parameter, DTensor] = {}    # their norms; empty before the first micro-batch
        self.clip = torch.ones((), device=self.device)  # and what they are multiplied by

        for parameter in self.param_groups[0]["params"]:
            shard = parameter.to_local()
            self.state[parameter] = {"step": torch.zeros((), device=self.device),
                                     "exp_avg": on_host(shard), "exp_avg_sq": on_host(shard)}

    def take_gradients(self) -> None:
        """From now on move each gradient to host memory as soon as FSDP has reduced it."""
        for parameter in self.param_groups[0]["params"]:
            self.gradients[parameter] = on_host(parameter.to_local())
            parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        """FSDP calls this in the stream that reduced the gradient, while the next layers go on backward."""
        shard, host = parameter.grad.to_local(), self.gradients[parameter]
        if parameter in self.norms:
            # Not the first micro-batch. The GPU adds: a CPU would have to wait for the copy, and is slower.
            shard += host.to(self.device, non_blocking=True)
        self.norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        host.copy_(shard, non_blocking=True)
        if self.streams:
            # Its memory may be of another stream, which must not use it again before all this is done.
            shard.record_stream(torch.cuda.current_stream())
        parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            with torch.cuda.stream(self.streams[number % 2]) if self.streams else nullcontext():
                self._update(parameter)
        if self.streams:
            torch.cuda.synchronize()  # a checkpoint reads the moments without asking any stream

    def _update(self, parameter: nn.Parameter) -> None:
        """Bring all that AdamW needs of a parameter to the device, update it there, and bring it back."""
        group, state = self.param_groups[0], self.state[parameter]
        if parameter in self.norms:
            gradient = self.gradients[parameter].to(self.device, non_blocking=True).mul_(self.clip)
        elif parameter.grad is not None:
            gradient = parameter.grad.to_local().to(self.device, non_blocking=True)
        else:
            return

        homes = [parameter.to_local(), state["exp_avg"], state["exp_avg_sq"]]
        visitors = [home.to(self.device, non_blocking=True) for home in homes]  # the same, if it lives there
        weight, exp_avg, exp_avg_sq = visitors
        beta1, beta2 = group["betas"]
        adamw([weight], [gradient], [exp_avg], [exp_avg_sq], [], [state["step"]], fused=True, amsgrad=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)
        for home, visitor in zip(homes, visitors, strict=True):
            if home is not visitor:
                home.copy_(visitor, non_blocking=True)

    def zero_grad(self) -> None:
        super().zero_grad()
        self.norms.clear()

    @torch.no_grad()
    def clip_grad_norm(self, limit: float) -> DTensor:
        if not self.gradients:
            return super().clip_grad_norm(limit)
        # Those in host memory are scaled when they come for their update.
        parameters = self.param_groups[0]["params"]
        norms = [self.norms[parameter] for parameter in parameters if parameter in self.norms]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self.clip = (limit / (norm.full_tensor() + 1e-6)).clamp(max=1.0)
        return norm


def make_adamw(parameters: Iterable[nn.Parameter], offload: str | None, **options: Any) -> ShardedAdamW:
    """The optimizer, with what --offload names in host memory."""
    if not offload:
        return ShardedAdamW(parameters, fused=True, **options)
    optimizer = HostAdamW(parameters, fused=True, **options)
    if offload == "gradients":
        optimizer.take_gradients()
    return optimizer

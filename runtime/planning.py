"""The arithmetic of memory: what a run holds on each GPU and in its host. bench/plan.py prints it, and it
decides where --gather-once is the default.

Bytes on one GPU, where s ranks share a copy of the model (all, or --shard-size) of N parameters, E in the
embedding, E in the head and P in a layer, and b = 2 in bf16:

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

With --gather-once (gathering.py) all layers are there, N b, and the rank's own sums of gradients, 4 N. In the
last micro-batch both go as the sums become shards.

Nobody counts CUDA's context and NCCL's buffers (CONTEXT), holes between allocations and what kernels take for
themselves (MARGIN). GB are 10^9 bytes, of which an "80 GB" card has 85.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import kernels
from data import Pair
from runtime import architectures, startup
from runtime.live_bytes import LiveBytes
from runtime.messages import InputError

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

CONTEXT, MARGIN = 2e9, 1.05  # for CUDA's context and NCCL's buffers; for holes between allocations


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


def count_layer(hf_config: transformers.PretrainedConfig, pairs: list[Pair], added: bool, config: Namespace,
                cuda: bool) -> tuple[int, int]:
    """(bytes that one layer keeps from its forward, most bytes in its backward, those and its weights'
    gradients included), for a batch of pairs. The layer's output belongs to what comes after it. Gradients
    are `added` one by one to those that are there, or else stay until the backward's end."""
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
            for parameter in layer.parameters() if added else ():
                parameter.grad = torch.empty_like(parameter)

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


def work_of(pairs: Sequence[Pair], ranks: int, config: Namespace) -> Work:
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


def tokens_in(batch: list[Pair], config: Namespace) -> int:
    return sum(pair.tokens(config.share_prefix) for pair in batch)


def states_of(count: float, offload: str | None) -> tuple[dict[str, float], dict[str, float]]:
    """(on a GPU, in host memory): name -> bytes that so many parameters take between steps, in fp32."""
    states = {"weights": 4 * count, "moments": 8 * count, "gradients": 4 * count}
    away = {None: (), "moments": ("moments",), "gradients": ("moments", "gradients"), "all": states}[offload]
    return ({name: size for name, size in states.items() if name not in away},
            {name: size for name, size in states.items() if name in away})


class Place(NamedTuple):
    """Where in its optimizer step a micro-batch stands."""

    is_first: bool
    is_last: bool


def gradients_and_layers(
    place: Place,
    once: bool,           # --gather-once
    parameters: int,      # N
    shards: float,        # bytes per parameter of a rank's share of the gradients, if it is on the GPU
    gathered_bytes: int,  # b, of a gathered parameter
    to_come: int,         # parameters whose gradients this micro-batch has still to make
    in_turn: int,         # parameters that are gathered now, if layers are gathered one after the other
    freed: int = 0,       # parameters whose gradients are being made or reduced, and that are let go already
) -> dict[str, float]:
    """Bytes of gradients and gathered layers at a moment of a backward."""
    to_come = min(to_come, parameters)  # as layers are counted as if all were as large as the largest
    made = parameters - to_come
    if not once:
        # In a first micro-batch gradients come one by one; in later ones all are there.
        return {"gradients": shards * (made if place.is_first else parameters),
                "gathered": gathered_bytes * in_turn}
    summed = parameters  # each rank's own sums, whole and in fp32
    if place.is_first:
        summed = made
    if place.is_last:
        summed = 0 if place.is_first else to_come  # they become shards, and the layers are let go
    return {"gradients": shards * made if place.is_last else 0,
            "summed gradients": 4 * summed,
            "gathered": gathered_bytes * (to_come - freed if place.is_last else parameters)}


def predict(
    shape: Shape,
    layer: tuple[int, int],  # as `count_layer` counts it for these pairs
    pairs: list[Pair],       # of a micro-batch
    place: Place,            # of it
    ranks: int,
    config: Namespace,
    cuda: bool,
) -> dict[str, dict[str, float]]:
    """moment -> what a GPU holds then -> bytes; and "host" -> what a rank has in host memory."""
    s = config.shard_size or ranks
    b = getattr(torch, config.dtype).itemsize
    N, E, P = shape.all, shape.end, shape.layer
    kept_of_layer, in_backward = layer
    length = tokens_in(pairs, config)  # L
    trained = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)  # T
    ahead = 1 if s > 1 else 0  # a rank alone gathers nothing ahead: it copies a group when that runs

    on_gpu, on_host = states_of(N / s, config.offload)
    shards = on_gpu.pop("gradients", 0) / N
    holds = partial(gradients_and_layers, place, config.gather_once, N, shards, b)
    if config.activation_checkpointing:
        kept_of_layer, recomputed = length * shape.hidden * b, in_backward
    else:
        recomputed = in_backward - kept_of_layer
    end = length * shape.hidden * (4 + b)  # the last norm keeps its input in fp32, and what it makes of it
    kept = {"kept for backward": shape.layers * kept_of_layer + end}
    width = min(kernels.BLOCK if cuda else kernels.BLOCK_CPU, E // shape.hidden)
    of_tile = 4 + (b if cuda and b < 4 else 0)  # the logits, and apart from them their 16-bit gradient
    tiles = {"tiles of the loss": trained * (width * of_tile + 2 * 4 * shape.hidden)}
    tied = E if shape.tied else 0  # gathered and with a whole gradient, from the head to the embedding
    are_reduced = place.is_last or not config.gather_once

    def in_layer(before: int) -> dict[str, float]:
        """In the backward of a layer that has so many before it."""
        next_gathered = (P if before else 0 if tied else E) * ahead
        reduced_before = P if before < shape.layers - 1 else 0 if tied else E
        return {
            **holds(before * P + P + E, P + next_gathered + tied),
            "kept for backward": (before + 1) * kept_of_layer,
            "layer in backward": recomputed,
            "gradients of ends": tied * b,
            "reduce-scatter": 4 * reduced_before if are_reduced else 0}

    moments = {
        "in the head's backward": {
            **holds(N, E + P * ahead), **kept, **tiles, "gradients of ends": E * b},
        # What is kept goes as gradients come, so the most is at one end.
        "in the last layer's backward": in_layer(shape.layers - 1),
        "in the last but one layer's backward": in_layer(max(0, shape.layers - 2)),
        "in the second layer's backward": in_layer(min(1, shape.layers - 1)),
        "in the first layer's backward": in_layer(0),
        "in the embedding's backward": {
            **holds(E, E), "reduce-scatter": 4 * P if are_reduced else 0,
            # Autograd adds a tied weight's two gradients into a third tensor.
            "gradients of ends": (3 if tied else 1) * E * b},
    }
    after_head = kept | holds(N, P * ahead, E)
    after_all = holds(E, 0, E)
    moments |= of_an_end(place, config.gather_once, tied > 0, after_head, after_all, E, s, b)
    if on_host and cuda:
        _, visitors = states_of(2 * E / s, config.offload)
        moments["in the update"] = {"gradients": shards * N, "visitors": sum(visitors.values())}
    return {**{moment: on_gpu | held for moment, held in moments.items()}, "host": on_host}


def of_an_end(place: Place, once: bool, tied: bool, after_head: dict[str, float], after_all: dict[str, float],
              E: int, s: int, b: int) -> dict[str, dict[str, float]]:
    """The moments in which the gradients of head and embedding are reduced, or added to sums."""
    are_summed = once and place != Place(True, True)
    if once and not place.is_last:
        # The first of all sums is an fp32 tensor beside the gradient; later ones are there, and counted.
        copied = E * (b + 4) if place.is_first and b < 4 and not tied else 0
        return {"when the head's gradient is summed": {**after_head, "gradients of ends": copied}}

    # The input in fp32, and shards before they are added to those of other micro-batches. torch 2.13's
    # foreach_reduce has the last gradient in a loop variable, where there is a loop. Sums are counted above.
    reducing = {
        "gradients of ends": E * b if s > 1 and not are_summed else 0,
        "reduce-scatter": 4 * E + (4 * E / s if s > 1 or not are_summed else 0)}
    moments = {"when the embedding's gradient is reduced": after_all | reducing}
    if not tied:
        moments["when the head's gradient is reduced"] = after_head | reducing
    return moments


class Plan(NamedTuple):
    """What is known of a run before it."""

    config: Namespace
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

    @property
    def needs(self) -> float:
        """Bytes that a GPU must have: with room for what nobody counts."""
        return self.bytes * MARGIN + CONTEXT

    def fits(self, memory: float) -> bool:
        return self.needs <= memory


class Planner:
    """A model, pairs and ranks, for which plans with other flags are made; what they have in common, once."""

    def __init__(self, hf_config: transformers.PretrainedConfig, pairs: Sequence[Pair], ranks: int,
                 cuda: bool = True):
        self.hf_config, self.pairs, self.ranks, self.cuda = hf_config, pairs, ranks, cuda
        self.shape = shape_of(hf_config)
        self.layers: dict[tuple, tuple[int, int]] = {}

    def plan(self, config: Namespace) -> Plan:
        if self.ranks % (config.shard_size or 1):
            raise InputError(f"--shard-size {config.shard_size}: must divide --gpus {self.ranks}")
        config = startup.with_budget(config, self.pairs, self.cuda)
        work = work_of(self.pairs, self.ranks, config)
        plans = []
        for batch, place in places(work):
            lengths = [len(part) for pair in batch for part in pair[:3]]
            added = config.gather_once and config.dtype == "float32" and not place.is_first
            key = (config.dtype, config.share_prefix, added, *lengths)
            if key not in self.layers:
                self.layers[key] = count_layer(self.hf_config, batch, added, config, self.cuda)
            moments = predict(self.shape, self.layers[key], batch, place, self.ranks, config, self.cuda)
            plans.append(Plan(config, work, moments, sum(moments.pop("host").values())))
        return max(plans, key=lambda plan: plan.bytes)


def places(work: Work) -> Iterator[tuple[list[Pair], Place]]:
    """The fullest batches, each in every place of an optimizer step that it may have."""
    first, *later = work.batches
    yield first, Place(True, not later)
    for batch in later:
        yield batch, Place(False, True)
        if work.micro_batches > 2:
            yield batch, Place(False, False)

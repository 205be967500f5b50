"""Why neither a matrix of logits nor an attention mask need exist: `linear_logps`, `packed_attention`.

**The head.** log p(target | hidden) = z[target] - logsumexp(z) with z = W hidden is one number per token,
but the plain way to it makes V of them: at 4096 tokens and a vocabulary of 152,064 that is 2.5 GB per fp32
copy of the logits, and log-softmax and its gradient want several copies. They are never all needed at once.

Forward: walk over the vocabulary in blocks. A matrix product makes the block's logits, a tile (T, BLOCK) in
fp32; a Triton kernel folds the tile into three running numbers per token, then the next tile overwrites it:

    m' = max(m, max_j z_j)   s' = s exp(m - m') + sum_j exp(z_j - m')   t' = z[target] if in the block, else t
    log p = (t - m) - log s  starting from m = -inf, s = 0

Backward: with g = dL/dlogp, and the tile made again (2 T V D more FLOPs, instead of keeping T x V numbers):

    dz_j = g (1[j = target] - exp(z_j - m) / s)     dW_block = dz^T hidden     dhidden += dz W_block

Each block of dW is written exactly once: no accumulator, no atomics, the same result every time. 8 T V D
FLOPs in all, 6 of which any method needs. Every vocabulary entry takes part; skipping "small" ones would
bias dW.

Why the product is not inside the Triton kernel, as "fused" suggests: it is nearly all of the work, and
Triton's products are slower than cuBLAS's. At T = 1024, D = 8192, V = 152,064 on an H200 the four products
take 14.0 of 15.2 ms; writing and reading the tiles between them, which fusing would save, is most of the
rest. cut-cross-entropy, which fuses, takes 46.7 ms (bench/README.md). The logits stay fp32 all the way: in
bf16 they would put 0.02-0.04 nats of noise on every token.

**Attention.** Many pairs stand in one sequence, each with a prefix and two spans that see it and not each
other (drawn in data.py). A mask of the whole sequence would have L x L entries, most of them 0. Instead each
segment attends by itself, to the keys of its prefix and then its own: ordinary causal attention.

This file needs torch (2.11 or later) and triton only, and can be copied alone; build any loss on the
log-probabilities that `linear_logps` returns. Copy it under another name where transformers is used too: that
looks for a package `kernels` of Hugging Face's.

In reading order. The head: its definition in plain torch, two Triton kernels, one tile forward and backward,
the autograd function, `linear_logps`. Attention: segments, its definition in masks, `packed_attention`.
Letters: T tokens, D hidden size, V vocabulary; S segments of a sequence of L tokens, with K keys in all; H
heads of size d, H' of keys and d' of values; `dx` is the gradient of the loss with respect to x.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Vocabulary entries of a tile: 18 x 8448 = 152,064 (Qwen2), and 33 x 256 columns fill whole waves on 132 SMs.
BLOCK = 8448
BLOCK_CPU = 2048  # on a CPU, so that a tile stays in the caches


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: what `linear_logps` computes, with all logits in memory."""
    logits = (hidden @ weight.T).float()  # (T, V)
    logps = logits.log_softmax(-1)        # (T, V)
    return logps.gather(1, targets[:, None])[:, 0]  # (T,)


# --------------------------------------------------------------------------------------------- Triton kernels
# One program per token. `tile` is contiguous fp32 (T, width); `start` is its first column's vocabulary index.


@triton.jit
def _fold_kernel(tile, targets, maximum, total, target_logit, start, width, CHUNK: tl.constexpr):
    """Fold a tile into the running maximum m, sum of exponentials s = `total` and target logit, each (T,)."""
    token = tl.program_id(0).to(tl.int64)  # 64 bits: token * width may exceed 2^31
    m, s = tl.load(maximum + token), tl.load(total + token)

    for offset in range(0, width, CHUNK):
        column = offset + tl.arange(0, CHUNK)
        z = tl.load(tile + token * width + column, mask=column < width, other=float("-inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m), 0)
        m = new_m

    tl.store(maximum + token, m)
    tl.store(total + token, s)

    # Of all blocks exactly one holds the target; the others leave its logit alone.
    target = tl.load(targets + token) - start
    if (target >= 0) & (target < width):
        tl.store(target_logit + token, tl.load(tile + token * width + target))


@triton.jit
def _dtile_kernel(tile, targets, maximum, total, dlogps, dtile, start, width, CHUNK: tl.constexpr):
    """dtile = dlogps * (onehot(target) - softmax), in the dtype of `dtile`, which may be `tile`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(tile + token * width + column, mask=column < width, other=float("-inf"))
    onehot = (column == tl.load(targets + token) - start).to(tl.float32)
    softmax = tl.exp(z - tl.load(maximum + token)) / tl.load(total + token)
    dz = tl.load(dlogps + token) * (onehot - softmax)
    tl.store(dtile + token * width + column, dz.to(dtile.dtype.element_ty), mask=column < width)


_INTERPRETED = not isinstance(_fold_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 when triton was imported
_CHUNK = 2048  # columns of a tile that a program holds at a time


# ----------------------------------------------------------------------------------------- one tile at a time


def _operand(x: Tensor) -> Tensor:
    """What GEMMs read: widened on CPU, since half-precision GEMMs with an fp32 result exist on CUDA only."""
    return x if x.is_cuda else x.float()


def _blocks(weight: Tensor):
    """(start, weight[start:start + width]), block by block."""
    width = BLOCK if weight.is_cuda else BLOCK_CPU
    for start in range(0, len(weight), width):
        yield start, _operand(weight[start:start + width])


def _logits(hidden: Tensor, block: Tensor) -> Tensor:  # (T, D), (width, D) -> (T, width) fp32
    if hidden.dtype == torch.float32:
        return hidden @ block.T
    return torch.mm(hidden, block.T, out_dtype=torch.float32)


def _targets_within(tile: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(tokens, columns) of the targets that lie in this tile."""
    tokens = ((targets >= start) & (targets < start + tile.shape[1])).nonzero()[:, 0]
    return tokens, targets[tokens] - start


def _fold(tile: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, target_logit: Tensor,
          start: int) -> None:
    """Fold a tile into the three running numbers of each token, in place. May overwrite the tile."""
    if tile.is_cuda or _INTERPRETED:
        grid = (len(tile),)
        _fold_kernel[grid](tile, targets, maximum, total, target_logit, start, tile.shape[1], CHUNK=_CHUNK)
        return

    tokens, columns = _targets_within(tile, targets, start)
    target_logit[tokens] = tile[tokens, columns]
    new_maximum = torch.maximum(maximum, tile.amax(1))
    total.mul_((maximum - new_maximum).exp_())
    total.add_(tile.sub_(new_maximum[:, None]).exp_().sum(1))
    maximum.copy_(new_maximum)


def _dtile(tile: Tensor, targets: Tensor, maximum: Tensor, total: Tensor, dlogps: Tensor, start: int,
           dtype: torch.dtype) -> Tensor:
    """Gradient of a tile of logits, (T, width) in `dtype`. May overwrite the tile."""
    if tile.is_cuda or _INTERPRETED:
        dtile = tile if dtype == torch.float32 else torch.empty_like(tile, dtype=dtype)
        grid = (len(tile), triton.cdiv(tile.shape[1], _CHUNK))
        _dtile_kernel[grid](tile, targets, maximum, total, dlogps, dtile, start, tile.shape[1], CHUNK=_CHUNK)
        return dtile

    tokens, columns = _targets_within(tile, targets, start)
    dtile = tile.sub_(maximum[:, None]).exp_().mul_((-dlogps / total)[:, None])
    dtile[tokens, columns] += dlogps[tokens]
    return dtile


# -------------------------------------------------------------------------------------- the autograd function


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        targets = targets.long().contiguous()
        # Starts at -inf, not 0, because all logits may be below 0.
        maximum = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
        total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)

        operand = _operand(hidden)
        for start, block in _blocks(weight):
            _fold(_logits(operand, block), targets, maximum, total, target_logit, start)

        # Kept apart: the sum m + log s would lose digits where all logits have a large part in common.
        ctx.save_for_backward(hidden, weight, targets, maximum, total)
        return (target_logit - maximum) - total.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogps: Tensor):
        hidden, weight, targets, maximum, total = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None

        dlogps = dlogps.contiguous()
        operand = _operand(hidden)
        for start, block in _blocks(weight):
            dtile = _dtile(_logits(operand, block), targets, maximum, total, dlogps, start, operand.dtype)

            if needs_weight:
                dblock = dweight[start:start + len(block)]
                if dblock.dtype == dtile.dtype:
                    torch.mm(dtile.T, operand, out=dblock)
                else:  # 16-bit weight on a CPU
                    dblock.copy_(dtile.T @ operand)

            if needs_hidden:
                if dtile.dtype == torch.float32:
                    dhidden.addmm_(dtile, block)
                else:  # the sum over the blocks stays in fp32
                    torch.addmm(dhidden, dtile, block, out_dtype=torch.float32, out=dhidden)

            del dtile  # before the next tile is made, so that there is never a second one
        return dhidden.to(hidden.dtype) if needs_hidden else None, dweight, None


# ---------------------------------------------------------------------------------------- the public function


def linear_logps(
    hidden: Tensor,   # (T, D) fp32, bf16 or fp16; T may be 0
    weight: Tensor,   # (V, D) same dtype and device
    targets: Tensor,  # (T,) integers in [0, V)
) -> Tensor:          # (T,) fp32
    """log softmax(hidden @ weight.T)[targets], in nats, differentiable in hidden and weight.

    Beyond inputs, result and gradients it holds, whatever V is, at most (forward and backward alike)

        T * BLOCK * (4 + itemsize) + T * D * 4 bytes         CUDA: tiles of logits and gradient; fp32 dhidden
        T * BLOCK_CPU * 4 + 2 (T + BLOCK_CPU) * D * 4 bytes  CPU: the same, and fp32 copies of 16-bit operands

    and a few numbers per token.

    Matrix products are the vendor's (bf16/fp16 operands, fp32 accumulation and result); the rest are Triton
    kernels on CUDA, and on CPU under TRITON_INTERPRET=1. Otherwise CPU runs plain torch over the same blocks.
    Each gradient is computed only if its input requires it. Double backward is not supported.
    Raises ValueError if shapes, dtypes or devices do not fit or a target is outside [0, V). (That last check
    waits for the device once per call.)
    """
    _check(hidden, weight, targets)
    if len(hidden) == 0:  # no kernel can be launched; the definition costs nothing, and gives zero gradients
        return plain_logps(hidden, weight, targets.long())
    # Triton launches on the current device; autocast would round the fp32 logits.
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        return _LinearLogps.apply(hidden, weight, targets)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} must be a plain tensor, got a DTensor: call this in the forward of the "
                             f"module that FSDP gathers it for, or pass {name}.full_tensor()")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("hidden must be (T, D) and weight (V, D), got "
                         f"{tuple(hidden.shape)} and {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be (T,) = ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError("hidden and weight must both be fp32, bf16 or fp16, got "
                         f"{hidden.dtype} and {weight.dtype}")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if not hidden.device == weight.device == targets.device:
        raise ValueError("hidden, weight and targets must be on one device, got "
                         f"{hidden.device}, {weight.device} and {targets.device}")
    if len(targets):
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets must be in [0, V) = [0, {len(weight)}), got {low} to {high}")


# --------------------------------------------------------------------------------------- attention of a batch


class Segments(NamedTuple):
    """How a sequence of L tokens is cut into S segments that attend each by itself.

    The queries of a segment stand together in it, one segment after the other. Its keys, gathered from
    the sequence by `key_index`, are those of its prefix (if it has one) and then its own.
    """

    query_lengths: list[int]  # (S,), adding up to L
    key_lengths: list[int]    # (S,), each at least as long as the queries; adding up to K
    key_index: Tensor         # (K,) int64: places in the sequence
    query_offsets: Tensor     # (S + 1,) int32: where each segment's queries begin, and L
    key_offsets: Tensor       # (S + 1,) int32: where each segment's keys begin among the K, and K


def visible(segments: Segments, window: int | None = None) -> Tensor:  # (L, L) bool
    """The rule as a mask: whether a query (a row) attends to a key (a column)."""
    L = sum(segments.query_lengths)
    mask = torch.zeros(L, L, dtype=torch.bool, device=segments.key_index.device)
    keys_of_segments = segments.key_index.split(segments.key_lengths)
    place = 0
    for n, keys in zip(segments.query_lengths, keys_of_segments, strict=True):
        # The last n keys are the queries' own, so query i sees all keys up to m - n + i.
        for i in range(n):
            last = len(keys) - n + i
            first = 0 if window is None else max(0, last + 1 - window)
            mask[place + i, keys[first:last + 1]] = True
        place += n
    return mask


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    scale: float | None = None, window: int | None = None,
) -> Tensor:
    """The definition: what `packed_attention` computes, with a mask of the whole sequence in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (1, H, L, d)
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)  # (1, H, L, L)
    weights = scores.masked_fill(~visible(segments, window), float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)  # (1, L, H, d)


def packed_attention(
    query: Tensor,  # (1, H, L, d)
    key: Tensor,    # (1, H', L, d), where H is a multiple of H'
    value: Tensor,  # (1, H', L, d')
    segments: Segments,
    scale: float | None = None,  # of the scores; None: 1 / sqrt(d)
    window: int | None = None,   # how many keys a token sees, itself included; None: all before it
) -> Tensor:        # (1, L, H, d')
    """Attention of a batch: causal in each segment, whose keys are its prefix's and then its own.

    A segment has n queries and m >= n keys, and the last n keys are the queries' own: ordinary causal
    attention that is aligned at the lower right. So no mask of the whole sequence is made.
    On CUDA in 16 bits that is one call of FlashAttention's kernel for unequal lengths, as torch has it;
    elsewhere, and for head sizes it does not take, torch's attention segment by segment.
    Raises ValueError if the lengths differ.
    """
    lengths = {sum(segments.query_lengths), query.shape[2], key.shape[2], value.shape[2]}
    if len(lengths) > 1:
        raise ValueError(f"segments, query, key and value must have one length L, got {sorted(lengths)}")
    key = key.index_select(2, segments.key_index)  # (1, H', K, d)
    value = value.index_select(2, segments.key_index)

    d = query.shape[-1]
    if query.is_cuda and query.dtype != torch.float32 and d % 8 == 0 and d <= 256 and d == value.shape[-1]:
        return _flash_attention(query, key, value, segments, scale, window)

    outputs = []
    for q, k, v in zip(query.split(segments.query_lengths, 2), key.split(segments.key_lengths, 2),
                       value.split(segments.key_lengths, 2), strict=True):
        n, m = q.shape[2], k.shape[2]
        mask = None  # torch's own causal mask is aligned at the upper left, so it serves where n == m
        if n < m or (window is not None and window < m):
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            if window is not None:
                mask = mask.triu(m - n - window + 1)
        outputs.append(F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None,
                     window: int | None) -> Tensor:
    """The same in one call; key and value are gathered already, (1, H', K, d)."""
    from torch.nn.attention import varlen  # brings the compiler with it, which takes seconds to import
    # The kernel shares key heads by itself. torch 2.11, which GPU images still have, has no argument for it.
    options = {"enable_gqa": True} if "enable_gqa" in varlen.varlen_attn.__kwdefaults__ else {}
    seen = (-1, 0) if window is None else (window - 1, 0)  # keys before a token, and after it
    return varlen.varlen_attn(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        segments.query_offsets, segments.key_offsets, max(segments.query_lengths), max(segments.key_lengths),
        scale=scale, window_size=seen, **options)[None]

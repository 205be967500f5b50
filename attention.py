"""Attention of a packed row, without masks.

A row holds many pairs, each with a prefix and two steps that see it and not each other (drawn in data.py). A
mask of the whole row would cost as much as what it hides. Instead a row is a list of segments, and each
attends by itself: its keys are those of its prefix and then its own, so it is ordinary causal attention.

Importing this file registers the attention as "segments" in transformers. The row that the layers work on is
put into `current_row` before they run.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import varlen

from files import refuse_model

# The row that is in the layers now, where `segment_attention` finds it: not all models pass keyword arguments
# on to their attention. Activation checkpointing runs a row's layers again before the next row comes.
current_row = SimpleNamespace(name="", segments=None, calls=0)


@torch.compiler.disable  # segments have other lengths in every row, and each would be compiled anew
def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, d)
    key: Tensor,    # (1, H', L, d), where H is a multiple of H'
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,  # how many tokens a token sees, itself included; None: all before it
    **others: Any,
) -> tuple[Tensor, None]:  # (1, L, H, d)
    """Attention of a packed row: causal in each segment, whose keys are its prefix's and then its own.

    A segment has n queries and m >= n keys, and the last n keys are the queries' own: plain causal attention
    that is aligned at the lower right. No mask of a whole row is made: it would cost what it hides.
    """
    for name, own in {"attention_mask": attention_mask, **others}.items():
        if name in ("attention_mask", "softcap", "s_aux", "position_bias") and own is not None:
            refuse_model(current_row.name, f"{type(module).__name__} attends with {name}, which is more than "
                                           "causal attention and sliding windows")
    if not getattr(module, "is_causal", True):
        refuse_model(current_row.name, f"{type(module).__name__} attends to what comes after a token")
    current_row.calls += 1
    segments = current_row.segments
    key = key.index_select(2, segments.key_index)  # (1, H', K, d)
    value = value.index_select(2, segments.key_index)

    # FlashAttention takes 16 bits and these head sizes; anything else goes segment by segment.
    d = query.shape[-1]
    if query.is_cuda and query.dtype != torch.float32 and d % 8 == 0 and d <= 256 and d == value.shape[-1]:
        return flash_attention(query, key, value, scaling, sliding_window), None

    outputs = []
    for q, k, v in zip(query.split(segments.query_lengths, 2), key.split(segments.key_lengths, 2),
                       value.split(segments.key_lengths, 2), strict=True):
        n, m = q.shape[2], k.shape[2]
        mask = None  # sdpa's own causal mask is aligned at the upper left, so it serves where n == m
        if n < m or (sliding_window is not None and sliding_window < m):
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            if sliding_window is not None:
                mask = mask.triu(m - n - sliding_window + 1)
        outputs.append(F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                    sliding_window: int | None) -> Tensor:
    """The same in one call: query (1, H, L, d), key and value gathered, (1, H', K, d) -> (1, L, H, d)."""
    # FlashAttention shares key heads by itself; torch 2.11 has no argument for it, and no check of heads.
    options = {"enable_gqa": True} if "enable_gqa" in varlen.varlen_attn.__kwdefaults__ else {}
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)  # tokens before it, and after it
    segments = current_row.segments
    return varlen.varlen_attn(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        segments.query_offsets, segments.key_offsets, max(segments.query_lengths), max(segments.key_lengths),
        scale=scaling, window_size=window, **options)[None]


transformers.AttentionInterface.register("segments", segment_attention)
transformers.AttentionMaskInterface.register("segments", lambda *args, **kwargs: None)

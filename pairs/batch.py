"""A batch of texts that a model goes on writing, one token of each at a time.

On CUDA the forward of one token is a few hundred short kernels, which take longer to start than to run. A
captured graph starts all of them at once. It repeats them on the very tensors that it was captured with, so
the number of rows and of columns that it reads stays the same. A batch captures a new one when half of its
rows have ended, or the columns are full.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .keyvalues import KeyValues

COLUMNS = 256  # a graph reads a multiple of so many


class Batch:
    """Rows with their keys and values, and what a model has to be told about them.

    counts[i] is the number of tokens that row i has at first, and each row has room for `more`.
    With `ready_masks` the model gets one mask for all of its layers, and else makes its own for each token.
    """

    def __init__(self, model: Any, kv_cache: KeyValues, counts: list[int], more: int, ready_masks: bool):
        self.model, self.kv_cache = model, kv_cache
        mask = left_padded(counts, kv_cache.get_seq_length(), more).to(model.device)
        self.mask = mask.bool()[:, None, None] if ready_masks else mask
        self.position = torch.tensor(counts, device=model.device)[:, None]  # of the next token
        self.rows = len(counts)
        self.size, self.captured = None, None  # of the present graph, and the graph

    def drop_all_but(self, rows: list[int], token: Tensor) -> tuple[list[int], Tensor]:
        """Drop all but these rows, which ascend. Returns their new order, and their tokens of (N,) in it."""
        order = self.kv_cache.drop_all_but(rows)
        index = torch.tensor(order, device=token.device)
        self.rows = len(rows)
        self.mask[:self.rows] = self.mask.index_select(0, index)  # where it was, as graphs read it
        self.position = self.position.index_select(0, index)
        return order, token.index_select(0, index)

    def read(self, token: Tensor) -> Tensor:
        """Next-token logits (N, V) after one more token (N,) of each row."""
        end = self.kv_cache.get_seq_length() + 1
        out = self.model(token[:, None], attention_mask=self.mask[:self.rows, ..., :end],
                         position_ids=self.position, past_key_values=self.kv_cache, use_cache=True)
        self.position = self.position + 1
        return out.logits[:, -1]

    def read_by_graph(self, token: Tensor) -> Tensor:
        """The same by a captured graph, with ready masks only. The result is valid until the next call."""
        length, (rows, *_, columns) = self.kv_cache.get_seq_length(), self.mask.shape
        size = (min(1 << (self.rows - 1).bit_length(), rows),
                min((length // COLUMNS + 1) * COLUMNS, columns))
        if size != self.size:
            self.captured = None  # whose memory is free from here on
            self.captured, self.size = Captured(self, *size), size
        logits = self.captured(token, self.position, length)
        self.kv_cache.advance()
        self.position = self.position + 1
        return logits[:self.rows]


class Captured:
    """The forward of one token for so many rows and columns. What is in rows that were dropped is ignored."""

    def __init__(self, batch: Batch, rows: int, columns: int):
        device = batch.model.device
        self.token, self.position = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
        self.column = torch.full((1,), batch.kv_cache.get_seq_length(), device=device)  # of the token
        every = torch.arange(columns, device=device)
        mask = batch.mask[:rows, ..., :columns]

        def forward() -> Tensor:
            out = batch.model(self.token, attention_mask=mask & (every <= self.column),
                              position_ids=self.position, past_key_values=batch.kv_cache, use_cache=True)
            return out.logits[:, -1]

        batch.kv_cache.clear_unused(columns)
        with batch.kv_cache.fixed_size(rows, columns, self.column):
            self.replay, self.logits = record(forward)

    def __call__(self, token: Tensor, position: Tensor, column: int) -> Tensor:
        self.token[:len(token), 0] = token
        self.position[:len(token)] = position
        self.column.fill_(column)
        self.replay()
        return self.logits


def record(forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(what runs the kernels of `forward` again, where its result is then)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()  # libraries set themselves up at a first call, which cannot be captured
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()
    return graph.replay, result


def left_padded(counts: list[int], width: int, more: int = 0) -> Tensor:
    """(N, width + more) ones, after zeros at the left of rows with fewer tokens than `width`."""
    start = width - torch.tensor(counts)[:, None]
    return (torch.arange(width + more) >= start).long()

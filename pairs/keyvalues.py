"""Keys and values of a batch of texts, which a model reads and goes on writing.

A row of the batch is a text, padded at its left. So all rows end in the same column, and the next token of
each goes into the next one. transformers' own cache makes new tensors for each token and whenever a row
leaves; here all stays where it was once written.
"""

import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Of one text that was read: keys and values of each layer, (heads, tokens, head size).
TextKeyValues = list[tuple[Tensor, Tensor]]


class Layer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, columns, head size), of which the first are in use."""

    is_sliding = False  # all columns are kept, and a window is a matter of the mask

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.rows, self.columns, self.length = rows, columns, 0
        self.fixed_size: tuple[int, int, Tensor] | None = None  # see KeyValues.fixed_size

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Room for keys and values like these."""
        self.keys = keys.new_empty(self.rows, keys.shape[-3], self.columns, keys.shape[-1])
        self.values = values.new_empty(self.rows, values.shape[-3], self.columns, values.shape[-1])
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write what is new into the next columns. Returns all that is in use."""
        if self.fixed_size is not None:
            rows, columns, column = self.fixed_size
            self.keys[:rows].index_copy_(2, column, keys)
            self.values[:rows].index_copy_(2, column, values)
            return self.keys[:rows, :, :columns], self.values[:rows, :, :columns]
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        start, self.length = self.length, self.length + keys.shape[-2]
        self.keys[:self.rows, :, start:self.length] = keys
        self.values[:self.rows, :, start:self.length] = values
        return self.keys[:self.rows, :, :self.length], self.values[:self.rows, :, :self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1  # no window


class KeyValues(Cache):
    """A batch, in the form that transformers' models take."""

    def __init__(self, rows: int, columns: int):
        super().__init__(layer_class_to_replicate=lambda: Layer(rows, columns))

    def begin(self, texts: Sequence[TextKeyValues | None], counts: list[int], width: int,
              text_of_row: Tensor) -> None:
        """Fill `width` columns: row i ends in the first counts[j] tokens of texts[j], j = text_of_row[i].

        Where a text is None, its count is 0.
        """
        like = next(text for text in texts if text is not None)
        for number, (keys, values) in enumerate(like):
            layer = self.layer_class_to_replicate()
            layer.lazy_initialization(keys, values)
            layer.length = width
            for part, to in enumerate((layer.keys, layer.values)):
                # Each text once. Padding must be finite: it is multiplied by attention of zero.
                rows = to.new_zeros(len(texts), to.shape[1], width, to.shape[3])
                for row, text, count in zip(rows, texts, counts, strict=True):
                    if count > 0:
                        row[:, width - count:] = text[number][part][:, :count]
                to[:, :, :width] = rows.index_select(0, text_of_row)
            self.layers.append(layer)

    def copy_of(self, row: int, count: int) -> TextKeyValues:
        """A copy of the last `count` columns of a row."""
        if not self.layers:
            raise ValueError("the model leaves no keys and values")  # it is a recurrent one
        return [(layer.keys[row, :, layer.length - count:layer.length].clone(),
                 layer.values[row, :, layer.length - count:layer.length].clone()) for layer in self.layers]

    def drop_all_but(self, rows: list[int]) -> list[int]:
        """Drop all but these rows, which ascend. Returns their new order.

        The last ones move into the places that become free, and the others stay where they are.
        """
        order = list(range(len(rows)))
        free = sorted(set(order) - set(rows))
        moved = rows[len(rows) - len(free):]
        for place, row in zip(free, moved, strict=True):
            order[place] = row
        for layer in self.layers:
            layer.rows = len(rows)
        if moved:
            # Once for all layers, because a GPU is waited for when it is told indices.
            free, moved = torch.tensor([free, moved], device=self.layers[0].keys.device)
            for layer in self.layers:
                for tensor in (layer.keys, layer.values):
                    used = tensor[:, :, :layer.length]
                    used.index_copy_(0, free, used.index_select(0, moved))
        return order

    @contextmanager
    def fixed_size(self, rows: int, columns: int, column: Tensor) -> Iterator[None]:
        """Here a model writes into the column that a tensor (1,) names, and reads these rows and columns."""
        for layer in self.layers:
            layer.fixed_size = (rows, columns, column)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.fixed_size = None

    def clear_unused(self, columns: int) -> None:
        """Make the unused ones of the first `columns` finite."""
        for layer in self.layers:
            layer.keys[:, :, layer.length:columns] = layer.values[:, :, layer.length:columns] = 0

    def advance(self) -> None:
        """Count a column that was written behind the back of this object."""
        for layer in self.layers:
            layer.length += 1


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return len(os.path.commonprefix([a, b]))


def nearest(ids: tuple[int, ...], texts: list[tuple[int, ...]]) -> tuple[tuple[int, ...] | None, int]:
    """(the text that has most tokens in common with `ids`, their number) of sorted texts; (None, 0) of none.

    In sorted order it stands next to the place of `ids`.
    """
    place = bisect(texts, ids)
    best, most = None, 0
    for text in texts[max(place - 1, 0):place + 1]:
        number = common(ids, text)
        if number > most:
            best, most = text, number
    return best, most

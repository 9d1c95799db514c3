"""The key/value cache: everything that belongs to one generation and to no model."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, in buffers that are allocated once and doubled when they are full.

    All rows have the same number of slots (`length`); shorter rows are padded on the left and hidden by `key_mask`.
    `position_delta` turns a slot into a text position, per row: position = slot + delta. It is negative behind left
    padding and, in M-RoPE, behind pictures, which take fewer positions than tokens. `memory` is for what a family
    keeps besides (Mllama's cross-attention keys and values).
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        self.length = 0
        self.capacity = capacity
        self.keys: list[Tensor | None] = [None] * num_layers  # each (B, G, capacity, K)
        self.values: list[Tensor | None] = [None] * num_layers
        self.padding: Tensor | None = None  # (B, T of the prompt) bool, True on left padding
        self.position_delta: Tensor | None = None  # (B,) int64
        self.memory: dict[str, Tensor] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes `k`, `v (B, G, T, K)` behind the tokens seen so far; returns all of them as `(B, G, S, K)` views.

        Every layer of a forward pass writes to the same slots; `advance` then moves on.
        """
        end = self.length + k.shape[2]
        if self.keys[layer] is None or self.keys[layer].shape[2] < end:
            self._grow(layer, k, v, end)
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values

    def advance(self, num_tokens: int):
        self.length += num_tokens

    def key_mask(self, num_slots: int) -> Tensor | None:
        """`(B, num_slots)` bool, False on left padding; None where no row is padded."""
        if self.padding is None:
            return None
        mask = self.padding.new_ones(self.padding.shape[0], num_slots)
        mask[:, : self.padding.shape[1]] = ~self.padding
        return mask

    def reorder(self, rows: Tensor):
        """Row i becomes a copy of row `rows[i]`; `rows` may be longer than the batch (beams are born this way)."""
        self.keys = [self._rows_of(buffer, rows) for buffer in self.keys]
        self.values = [self._rows_of(buffer, rows) for buffer in self.values]
        self.padding = None if self.padding is None else self.padding[rows]
        self.position_delta = self.position_delta[rows]
        self.memory = {name: x[rows] for name, x in self.memory.items()}

    def _rows_of(self, buffer: Tensor | None, rows: Tensor) -> Tensor | None:
        if buffer is None:
            return None
        new = buffer.new_empty(len(rows), *buffer.shape[1:])
        new[:, :, : self.length] = buffer[rows, :, : self.length]  # what is free need not be copied
        return new

    def _grow(self, layer: int, k: Tensor, v: Tensor, needed: int):
        if needed > self.capacity:
            self.capacity = max(needed, 2 * self.capacity)
        for store, new in ((self.keys, k), (self.values, v)):
            bigger = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
            if store[layer] is not None:
                bigger[:, :, : self.length] = store[layer][:, :, : self.length]
            store[layer] = bigger


def causal_mask(T: int, S: int, key_mask: Tensor | None, window: int | None, device) -> Tensor | None:
    """Who may look at whom: bool `(B or 1, 1, T, S)`, True where query i (slot S − T + i) may attend to slot j.

    A query sees the slots up to its own, the last `window` of them if there is one, and no padding. A padding query
    sees itself alone: a row without any key would be 0/0. None where plain causality says it all, so that no T × S
    tensor is made.
    """
    if key_mask is None and (window is None or window >= S) and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
    slot = torch.arange(S, device=device)  # (S,)
    mask = slot <= query
    if window is not None:
        mask &= slot > query - window
    mask = mask[None, None]  # (1, 1, T, S)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None] | (slot == query)
    return mask

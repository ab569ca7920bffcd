"""The key-value cache of a teacher whose graph keeps no state: it comes in, and only what is new goes out."""

from __future__ import annotations

import torch
from torch import Tensor


class ExplicitCache:
    """Keys and values of one layer. The host owns them: nothing of them is copied or changed in here.

    Rows of a batch are doubled for guidance, conditional rows before unconditional ones; that pair is an axis
    of its own here. After a pass `new` holds keys and values of its positions, [2, B, H, n, D] float32 each.

    Args:
        keys, values: [2, B, H, capacity, D] float32, finite everywhere, also where nothing was written yet.
        filled: [1] int64, how many leading positions of them are valid.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: Tensor) -> None:
        self.keys, self.values = keys, values
        place = torch.arange(keys.shape[3], device=keys.device)
        self.hidden = _additive(place >= filled)
        self.new: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [2B, H, n, D] of new positions, which see all valid ones and, by the additive mask [n, n]
        (None: all), each other -> [2B, H, n, D].

        Both parts meet in one softmax. The scores are joined, which are small; the cache is not.
        """
        shape = q.shape
        q, k, v = (t.reshape(2, -1, *shape[1:]) for t in (q, k, v))
        self.new = k.float(), v.float()
        among = q @ k.transpose(-2, -1)
        if mask is not None:
            among = among + mask.to(q.dtype)
        before = q @ self.keys.to(q.dtype).transpose(-2, -1) + self.hidden.to(q.dtype)
        weights = torch.cat([before, among], dim=-1).softmax(-1)
        old, fresh = weights.split([self.keys.shape[3], k.shape[3]], dim=-1)
        return (old @ self.values.to(q.dtype) + fresh @ v).reshape(shape)


def causal(positions: Tensor) -> Tensor:
    """The additive mask [n, n] with which each of the positions [n] sees itself and earlier ones."""
    return _additive(positions[None, :] > positions[:, None])


def _additive(hidden: Tensor) -> Tensor:
    nothing = torch.zeros((), device=hidden.device)
    return torch.where(hidden, nothing - torch.inf, nothing)

"""Herding: rows of a class whose mean of features is closest to that of all its rows."""

from typing import Any

import torch
from torch import Tensor


def herded(method: Any, split: Any, label: int, number: int) -> Tensor:
    """At most `number` rows (n,) int64 of a class in a split, in the order of herding, by features that are not
    normalised; none where it has no rows (--validation may hold out all)."""
    rows = (split.labels == label).nonzero().squeeze(1)
    if len(rows) == 0:
        return rows
    features = method.outputs_of(method.net.features, split.images.index_select(0, rows))
    return rows[herd(features, number).to(rows.device)]


def herd(features: Tensor, number: int) -> Tensor:
    """Herding (Welling, 2009; iCaRL, algorithm 4): features (n, F) -> rows (min(n, number),) int64, in order.

    The i-th is the row that brings the mean of the i chosen ones closest to the mean of all.
    """
    away = features - features.mean(0)  # then |mean - (f + chosen) / i| is |away + their sum| / i
    sizes, total, chosen = away.square().sum(1), torch.zeros_like(away[0]), []
    for _ in range(min(number, len(features))):
        pick = (sizes + 2 * (away @ total)).argmin().view(1)
        chosen.append(pick)
        total = total + away.index_select(0, pick)[0]
        sizes = sizes.index_fill(0, pick, torch.inf)
    return torch.cat(chosen)

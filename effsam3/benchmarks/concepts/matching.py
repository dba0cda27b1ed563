# SPDX-License-Identifier: Apache-2.0
"""One-to-one matching at the least cost (the assignment problem).

Letters: R rows, C columns.
"""

from __future__ import annotations

import numpy as np


def assign(cost_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, ascending, and their columns that cost least in all; every row or every column has one.

    Kuhn's Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987): row after row gets a column, at
    the least cost of moving earlier rows elsewhere. Cubic in the shorter side, with the inner loop in numpy; finite
    costs only.
    """
    if cost_RC.shape[0] > cost_RC.shape[1]:
        columns, rows = assign(cost_RC.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    count, wide = cost_RC.shape
    # Prices keep every cost - row_price - column_price >= 0, and 0 on what is matched: so a shortest path costs no
    # detour. Column `wide` is a made-up one, where the row that has no column yet stands.
    row_price, column_price = np.zeros(count), np.zeros(wide + 1)
    owner = np.full(wide + 1, -1)
    for row in range(count):
        owner[wide], column = row, wide
        shortest, before, done = np.full(wide, np.inf), np.full(wide, wide), np.zeros(wide + 1, dtype=bool)
        while owner[column] >= 0:
            done[column] = True
            left = ~done[:wide]
            reduced = cost_RC[owner[column]] - row_price[owner[column]] - column_price[:wide]
            nearer = left & (reduced < shortest)
            shortest[nearer], before[nearer] = reduced[nearer], column
            column = int(np.argmin(np.where(left, shortest, np.inf)))
            step = shortest[column]
            row_price[owner[done]] += step
            column_price[done] -= step
            shortest[left] -= step
        while column != wide:  # along the path, every row moves on by one column
            owner[column] = owner[before[column]]
            column = before[column]
    taken = np.flatnonzero(owner[:wide] >= 0)
    order = np.argsort(owner[taken])
    return owner[taken][order], taken[order]

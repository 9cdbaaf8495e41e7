"""Groups of things that share keys, such as scans of one patient and copies of one picture."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """The group of each of n things, as the index of its first member. Things are connected where they share a key.

    keys [n]: the keys of each.
    """
    nodes: dict[Hashable, int] = {}
    edges = [(i, len(keys) + nodes.setdefault(key, len(nodes))) for i, own in enumerate(keys) for key in own]
    graph = sparse.coo_matrix((np.ones(len(edges)), np.array(edges, int).reshape(-1, 2).T),
                              shape=(len(keys) + len(nodes),) * 2)
    groups = csgraph.connected_components(graph, directed=False)[1][:len(keys)]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return first[group].tolist()

"""What belongs together because it shares something, such as scans of one patient and copies of one picture."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Of each of n things, given its keys, the index of the first in its group: of those that share a key with it, or
    with others of the group."""
    nodes: dict[Hashable, int] = {}
    edges = [(i, len(keys) + nodes.setdefault(key, len(nodes))) for i, own in enumerate(keys) for key in own]
    graph = sparse.coo_matrix((np.ones(len(edges)), np.array(edges, int).reshape(-1, 2).T),
                              shape=(len(keys) + len(nodes),) * 2)
    groups = csgraph.connected_components(graph, directed=False)[1][:len(keys)]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    return first[group].tolist()

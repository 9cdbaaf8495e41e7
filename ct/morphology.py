"""Exact Euclidean morphology of 2-D masks and stacks of them, by shifted rows instead of distance transforms.

A pixel belongs to a disc when its centre lies within the radius, in pixels, of the disc's centre. What lies outside a
mask's array is neither set nor background: it dilates into nothing and erodes nothing.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull


def dilate(mask: np.ndarray, radius: float) -> np.ndarray:
    """What lies within radius of a set pixel of its own slice; bool [..., H, W] both."""
    reach = int(radius)
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(0, reach), (0, reach)])
    # One run of memory, shifted as a whole: the padding keeps what leaves a row or a slice out of the next one.
    wide, out = padded.reshape(-1).copy(), np.zeros(padded.size, bool)
    half_width = 0
    for row in range(reach, -1, -1):                      # of the disc, which is the wider the nearer its centre
        while sqrt(row * row + (half_width + 1) ** 2) <= radius:
            half_width += 1
            _or_shifted(wide, padded.reshape(-1), half_width)
        _or_shifted(out, wide, row * padded.shape[-1])
    return out.reshape(padded.shape)[..., :mask.shape[-2], :mask.shape[-1]]


def _or_shifted(out: np.ndarray, flat: np.ndarray, by: int) -> None:
    """out |= flat shifted by that many places either way."""
    out[by:] |= flat[:len(flat) - by]
    if by:
        out[:-by] |= flat[by:]


def erode(mask: np.ndarray, radius: float) -> np.ndarray:
    """What lies further than radius from every unset pixel of its own slice; bool [..., H, W] both."""
    return ~dilate(~mask, radius)


def opened(mask: np.ndarray, radius: float) -> np.ndarray:
    """The parts of a mask that a disc fits into; bool [..., H, W] both."""
    return dilate(erode(mask, radius), radius)


def closed(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask with the gaps that no disc fits into; bool [..., H, W] both."""
    pad = int(radius) + 2
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(pad, pad)] * 2)
    return erode(dilate(padded, radius), radius)[..., pad:-pad, pad:-pad]


def filled(mask: np.ndarray) -> np.ndarray:
    """A mask with its holes: what no path along rows and columns joins to the picture's edge; bool [H, W] both."""
    labels, count = ndimage.label(~mask)
    inside = np.ones(count + 1, bool)                     # label 0 is the mask itself
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        inside[edge[edge > 0]] = False
    return inside[labels]


def hull(mask: np.ndarray) -> np.ndarray:
    """The pixels in a mask's convex hull; bool [H, W] both. A pixel reaches to the middles of its four edges.

    Equals skimage.morphology.convex_hull_image, which tests every pixel against every edge of the hull.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return mask
    first, last = mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    ends = 2 * np.stack([np.concatenate([rows, rows]), np.concatenate([first, last])], axis=1)   # in half pixels: exact
    corners = np.concatenate([ends + corner for corner in ((-1, 0), (1, 0), (0, -1), (0, 1))])
    ring = corners[ConvexHull(corners).vertices]
    after = np.roll(ring, -1, axis=0)
    steep = ring[:, 0] != after[:, 0]
    up = (ring[:, 0] < after[:, 0])[:, None]
    (y0, x0), (y1, x1) = (np.where(up, a, b)[steep].T[..., None] for a, b in ((ring, after), (after, ring)))
    y = 2 * np.arange(mask.shape[0])
    crossing, scale = x0 * (y1 - y0) + (x1 - x0) * (y - y0), 2 * (y1 - y0)                       # [edges, H], in pixels
    met = (y0 <= y) & (y <= y1)
    left = np.where(met, -(-crossing // scale), mask.shape[1]).min(axis=0)
    right = np.where(met, crossing // scale, -1).max(axis=0)
    columns = np.arange(mask.shape[1])
    return (left[:, None] <= columns) & (columns <= right[:, None])


def box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """The rows and columns that a mask, bool [H, W], lies in, and a margin around them; all where nothing is set."""
    spans = []
    for axis in (0, 1):
        along = np.flatnonzero(mask.any(axis=1 - axis))
        spans.append(slice(max(0, along[0] - margin), along[-1] + 1 + margin) if len(along) else slice(None))
    return tuple(spans)

"""How well parts of an image that a model found agree with its true objects.

Shape suffixes: P pixels, L labels, C clusters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def adjusted_rand_index(labels: NDArray[np.integer], clusters: NDArray[np.integer]) -> float:
    """How alike two partitions of the same pixels are, adjusted for chance (Hubert and Arabie, "Comparing Partitions",
    1985): 1 if they are the same but for names, about 0 if they have nothing to do with each other.

    The number of pairs of pixels that both put together, less what is expected of random partitions into parts of these
    sizes, over the most that it could be less the same. Two partitions that both are a single part, or both put every
    pixel alone, are the same, and give 1.

    Args:
        labels, clusters: of the same shape; whole numbers, not negative, that name the parts.

    Raises:
        ValueError: they differ in shape.
    """
    if labels.shape != clusters.shape:
        raise ValueError(f"two partitions of the same pixels were expected, got {labels.shape} and {clusters.shape}")
    _, label_P = np.unique(labels, return_inverse=True)
    _, cluster_P = np.unique(clusters, return_inverse=True)
    columns = int(cluster_P.max(initial=-1)) + 1
    cells = np.bincount(label_P.ravel() * columns + cluster_P.ravel()).astype(np.float64)
    by_label, by_cluster = (np.bincount(part.ravel()).astype(np.float64) for part in (label_P, cluster_P))
    together, first, second = (float((sizes * (sizes - 1)).sum() / 2) for sizes in (cells, by_label, by_cluster))
    pairs = labels.size * (labels.size - 1) / 2
    expected = first * second / pairs if pairs else 0.0
    most = (first + second) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)

"""Clusters of tokens: by density peaks (ClusTR, arXiv 2208.13138) and by k-means."""

from regard.ops.clustering.density_peaks import Clusters, density_peak_clusters
from regard.ops.clustering.kmeans import KMeansClusters, kmeans_clusters
from regard.ops.clustering.merge import merge_tokens
from regard.ops.clustering.reference import density_peaks_reference

__all__ = [
    "Clusters",
    "KMeansClusters",
    "density_peak_clusters",
    "density_peaks_reference",
    "kmeans_clusters",
    "merge_tokens",
]

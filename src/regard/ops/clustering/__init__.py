"""Clusters of tokens: by density peaks (ClusTR, arXiv 2208.13138) and by k-means."""

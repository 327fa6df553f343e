"""Look inside a model: who looks at whom, how far, and how sharply."""

from regard.inspection.maps import attention_maps
from regard.inspection.summaries import entropy, mean_attention_distance

__all__ = ["attention_maps", "entropy", "mean_attention_distance"]

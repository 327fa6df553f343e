"""The bound that tiles put on neighborhood attention, and the patterns that come near to what their FLOPs promise.

Arithmetic on windows and tiles, no measurement: it knows no torch and imports no other room, so that a kernel that
chooses its tiles, a benchmark and the command line may all ask it.
"""

from regard.simulation.bound import Simulation, simulate
from regard.simulation.pattern import NeighborhoodPattern, PatternError, Tiling
from regard.simulation.search import VARIED, Candidate, search
from regard.simulation.windows import window_bounds

__all__ = [
    "VARIED",
    "Candidate",
    "NeighborhoodPattern",
    "PatternError",
    "Simulation",
    "Tiling",
    "search",
    "simulate",
    "window_bounds",
]

"""Measuring: time and memory of operators side by side, the gate that comes first, and the machine they ran on."""

from regard.benchmark.costs import crossover, measure_costs
from regard.benchmark.gate import GateResult, Judgement, check_knn, error_budget
from regard.benchmark.machine import Ceilings, environment, measure_ceilings
from regard.benchmark.memory import Job, Peak, measure_peaks
from regard.benchmark.peers import published_knn_attention
from regard.benchmark.timing import Ratio, Timing, interleave

__all__ = [
    "Ceilings",
    "GateResult",
    "Job",
    "Judgement",
    "Peak",
    "Ratio",
    "Timing",
    "check_knn",
    "crossover",
    "environment",
    "error_budget",
    "interleave",
    "measure_ceilings",
    "measure_costs",
    "measure_peaks",
    "published_knn_attention",
]

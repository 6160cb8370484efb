"""nnsanity: finds out why a neural network does not train, in any JAX code."""

from nnsanity._tree import leaf_names
from nnsanity.checks.batch_size import (
    NoiseScale,
    example_gradient_norms,
    gradient_noise_scale,
)
from nnsanity.checks.final_activation import Reachable, reachable
from nnsanity.checks.gradients import (
    DeadUnits,
    GradientStats,
    dead_units,
    gradient_stats,
)
from nnsanity.checks.initialization import WeightStats, weight_stats
from nnsanity.checks.learning_rate import LRRange, LRSweep, lr_range, lr_sweep
from nnsanity.checks.normalization import Normalization, normalization
from nnsanity.checkup import checkup
from nnsanity.curvature import Sharpness, sharpness
from nnsanity.findings import DiagnosisError, Finding
from nnsanity.lint import lint
from nnsanity.moments import Moments, feature_moments, merge_moments, z_scores
from nnsanity.monitor.state import MonitorState
from nnsanity.monitor.watch import Monitor, monitor
from nnsanity.monitor.wrapping import MonitoredState
from nnsanity.report import Report
from nnsanity.signals import Signals, activations, value_and_grad
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import Layer, Uninspected, layers
from nnsanity.tracing.noise import Dropout, dropout_rates

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "DeadUnits",
    "DiagnosisError",
    "Dropout",
    "Finding",
    "GradientStats",
    "LRRange",
    "LRSweep",
    "Layer",
    "Moments",
    "Monitor",
    "MonitorState",
    "MonitoredState",
    "NoiseScale",
    "Normalization",
    "Reachable",
    "Report",
    "Sharpness",
    "Signals",
    "Uninspected",
    "WeightStats",
    "activations",
    "averaged_terms",
    "checkup",
    "dead_units",
    "dropout_rates",
    "example_gradient_norms",
    "feature_moments",
    "gradient_noise_scale",
    "gradient_stats",
    "layers",
    "leaf_names",
    "lint",
    "lr_range",
    "lr_sweep",
    "merge_moments",
    "monitor",
    "normalization",
    "output_bounds",
    "reachable",
    "sharpness",
    "value_and_grad",
    "weight_stats",
    "z_scores",
]

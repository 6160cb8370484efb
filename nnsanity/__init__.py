"""nnsanity: finds out why a neural network does not train, in any JAX code."""

from nnsanity._tree import leaf_names
from nnsanity.checks.final_activation import Reachable, reachable
from nnsanity.checks.gradients import (
    DeadUnits,
    GradientStats,
    dead_units,
    gradient_stats,
)
from nnsanity.checks.initialization import WeightStats, weight_stats
from nnsanity.checks.learning_rate import (
    Outliers,
    outlier_examples,
    update_ratios,
)
from nnsanity.checks.normalization import Normalization, normalization
from nnsanity.checks.regularization import (
    GeneralizationGap,
    generalization_gap,
    penalty_pull,
    weight_decay,
)
from nnsanity.checkup import checkup
from nnsanity.clipping import Clipping, clipping
from nnsanity.curvature import Sharpness, sharpness
from nnsanity.example_norms import example_gradient_norms
from nnsanity.findings import DiagnosisError, Finding
from nnsanity.lint import lint
from nnsanity.moments import Moments, feature_moments, merge_moments, z_scores
from nnsanity.monitor.state import MonitorState
from nnsanity.monitor.watch import Monitor, monitor
from nnsanity.noise_average import (
    NoiseAverage,
    add_noise,
    averaged_noise,
    noise_average,
)
from nnsanity.noise_scale import (
    NoiseScale,
    gradient_noise_scale,
    leaf_noise_scales,
    value_and_grad_with_noise,
)
from nnsanity.rate_curves import LRRange, LRSweep, lr_range, lr_sweep
from nnsanity.report import Report
from nnsanity.signals import Signals, activations, value_and_grad
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import Layer, Uninspected, layers
from nnsanity.tracing.noise import Dropout, dropout_rates
from nnsanity.training_noise import LossNoise, noise

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "Clipping",
    "DeadUnits",
    "DiagnosisError",
    "Dropout",
    "Finding",
    "GeneralizationGap",
    "GradientStats",
    "LRRange",
    "LRSweep",
    "Layer",
    "LossNoise",
    "Moments",
    "Monitor",
    "MonitorState",
    "NoiseAverage",
    "NoiseScale",
    "Normalization",
    "Outliers",
    "Reachable",
    "Report",
    "Sharpness",
    "Signals",
    "Uninspected",
    "WeightStats",
    "activations",
    "add_noise",
    "averaged_noise",
    "averaged_terms",
    "checkup",
    "clipping",
    "dead_units",
    "dropout_rates",
    "example_gradient_norms",
    "feature_moments",
    "generalization_gap",
    "gradient_noise_scale",
    "gradient_stats",
    "layers",
    "leaf_names",
    "leaf_noise_scales",
    "lint",
    "lr_range",
    "lr_sweep",
    "merge_moments",
    "monitor",
    "noise",
    "noise_average",
    "normalization",
    "outlier_examples",
    "output_bounds",
    "penalty_pull",
    "reachable",
    "sharpness",
    "update_ratios",
    "value_and_grad",
    "value_and_grad_with_noise",
    "weight_decay",
    "weight_stats",
    "z_scores",
]

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
from nnsanity.checks.preprocessing import Duplicates, duplicates
from nnsanity.checkup import checkup
from nnsanity.columns import Wraparound, wraparound
from nnsanity.curvature import Sharpness, sharpness
from nnsanity.dependence import (
    ExampleIndependence,
    InputDependence,
    example_independence,
    input_dependence,
)
from nnsanity.errors import (
    ConstantBaseline,
    WorstExamples,
    constant_baseline,
    worst_examples,
)
from nnsanity.findings import DiagnosisError, Finding
from nnsanity.lint import lint
from nnsanity.moments import (
    Moments,
    denormalize,
    feature_moments,
    group_moments,
    merge_moments,
    normalize,
    z_scores,
)
from nnsanity.monitor.state import MonitorState
from nnsanity.monitor.watch import Monitor, monitor
from nnsanity.neighbors import Continuity, continuity
from nnsanity.outliers import Outliers, outliers
from nnsanity.overfit import Overfit, overfit_batch
from nnsanity.report import Report
from nnsanity.representation import (
    Invariance,
    RoundtripError,
    invariance,
    roundtrip_error,
)
from nnsanity.scales import (
    Normalization,
    TargetScale,
    normalization,
    target_scale,
)
from nnsanity.signals import Signals, activations, value_and_grad
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import Layer, Uninspected, layers
from nnsanity.tracing.noise import Dropout, dropout_rates
from nnsanity.tracing.nonfinite import Birth, FirstNonfinite, Places, first_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Birth",
    "Bounds",
    "ConstantBaseline",
    "Continuity",
    "DeadUnits",
    "DiagnosisError",
    "Dropout",
    "Duplicates",
    "ExampleIndependence",
    "Finding",
    "FirstNonfinite",
    "GradientStats",
    "InputDependence",
    "Invariance",
    "LRRange",
    "LRSweep",
    "Layer",
    "Moments",
    "Monitor",
    "MonitorState",
    "NoiseScale",
    "Normalization",
    "Outliers",
    "Overfit",
    "Places",
    "Reachable",
    "Report",
    "RoundtripError",
    "Sharpness",
    "Signals",
    "TargetScale",
    "Uninspected",
    "WeightStats",
    "WorstExamples",
    "Wraparound",
    "activations",
    "averaged_terms",
    "checkup",
    "constant_baseline",
    "continuity",
    "dead_units",
    "denormalize",
    "dropout_rates",
    "duplicates",
    "example_gradient_norms",
    "example_independence",
    "feature_moments",
    "first_nonfinite",
    "gradient_noise_scale",
    "gradient_stats",
    "group_moments",
    "input_dependence",
    "invariance",
    "layers",
    "leaf_names",
    "lint",
    "lr_range",
    "lr_sweep",
    "merge_moments",
    "monitor",
    "normalization",
    "normalize",
    "outliers",
    "output_bounds",
    "overfit_batch",
    "reachable",
    "roundtrip_error",
    "sharpness",
    "target_scale",
    "value_and_grad",
    "weight_stats",
    "worst_examples",
    "wraparound",
    "z_scores",
]

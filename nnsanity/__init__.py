"""nnsanity: finds out why a neural network does not train, in any JAX code."""

from nnsanity._tree import leaf_names
from nnsanity.checks.depth import DepthProfile, depth_profile
from nnsanity.checks.final_activation import Reachable, reachable
from nnsanity.checks.learning_rate import (
    OutlierExamples,
    outlier_examples,
    update_ratios,
)
from nnsanity.checks.preprocessing import Duplicates, duplicates
from nnsanity.checks.regularization import (
    GeneralizationGap,
    generalization_gap,
    penalty_pull,
    weight_decay,
)
from nnsanity.checks.width import WidthProfile, width_profile
from nnsanity.checkup import checkup
from nnsanity.clipped import BlockedShare, blocked_share
from nnsanity.clipping import Clipping, clipping
from nnsanity.columns import Wraparound, wraparound
from nnsanity.curvature import Sharpness, sharpness
from nnsanity.dead import DeadUnits, dead_units, merge_dead_units
from nnsanity.dependence import (
    ExampleIndependence,
    InputDependence,
    example_independence,
    input_dependence,
)
from nnsanity.dormant import DormantUnits, dormant_units, merge_dormant_units
from nnsanity.errors import (
    ConstantBaseline,
    WorstExamples,
    constant_baseline,
    worst_examples,
)
from nnsanity.example_norms import example_gradient_norms
from nnsanity.findings import DiagnosisError, Finding
from nnsanity.gradient_sizes import GradientStats, gradient_stats
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
from nnsanity.monitor.wrapping import MonitoredState
from nnsanity.neighbors import Continuity, continuity
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
from nnsanity.outliers import Outliers, outliers
from nnsanity.overfit import Overfit, overfit_batch
from nnsanity.rate_curves import LRRange, LRSweep, lr_range, lr_sweep
from nnsanity.report import Report
from nnsanity.representation import (
    Invariance,
    RoundtripError,
    invariance,
    roundtrip_error,
)
from nnsanity.saturated import (
    SaturatedUnits,
    merge_saturated_units,
    saturated_units,
)
from nnsanity.scales import (
    Normalization,
    TargetScale,
    normalization,
    target_scale,
)
from nnsanity.signal_gain import SignalGain, signal_gain, unit_gradients
from nnsanity.signals import Signals, activations, value_and_grad
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import Layer, Uninspected, layers
from nnsanity.tracing.noise import Dropout, dropout_rates
from nnsanity.tracing.nonfinite import Birth, FirstNonfinite, Places, first_nonfinite
from nnsanity.training_noise import LossNoise, noise
from nnsanity.weight_sizes import WeightStats, weight_stats

__version__ = "0.1.0"

__all__ = [
    "Birth",
    "BlockedShare",
    "Bounds",
    "Clipping",
    "ConstantBaseline",
    "Continuity",
    "DeadUnits",
    "DepthProfile",
    "DiagnosisError",
    "DormantUnits",
    "Dropout",
    "Duplicates",
    "ExampleIndependence",
    "Finding",
    "FirstNonfinite",
    "GeneralizationGap",
    "GradientStats",
    "InputDependence",
    "Invariance",
    "LRRange",
    "LRSweep",
    "Layer",
    "LossNoise",
    "Moments",
    "Monitor",
    "MonitorState",
    "MonitoredState",
    "NoiseAverage",
    "NoiseScale",
    "Normalization",
    "OutlierExamples",
    "Outliers",
    "Overfit",
    "Places",
    "Reachable",
    "Report",
    "RoundtripError",
    "SaturatedUnits",
    "Sharpness",
    "SignalGain",
    "Signals",
    "TargetScale",
    "Uninspected",
    "WeightStats",
    "WidthProfile",
    "WorstExamples",
    "Wraparound",
    "activations",
    "add_noise",
    "averaged_noise",
    "averaged_terms",
    "blocked_share",
    "checkup",
    "clipping",
    "constant_baseline",
    "continuity",
    "dead_units",
    "denormalize",
    "depth_profile",
    "dormant_units",
    "dropout_rates",
    "duplicates",
    "example_gradient_norms",
    "example_independence",
    "feature_moments",
    "first_nonfinite",
    "generalization_gap",
    "gradient_noise_scale",
    "gradient_stats",
    "group_moments",
    "input_dependence",
    "invariance",
    "layers",
    "leaf_names",
    "leaf_noise_scales",
    "lint",
    "lr_range",
    "lr_sweep",
    "merge_dead_units",
    "merge_dormant_units",
    "merge_moments",
    "merge_saturated_units",
    "monitor",
    "noise",
    "noise_average",
    "normalization",
    "normalize",
    "outlier_examples",
    "outliers",
    "output_bounds",
    "overfit_batch",
    "penalty_pull",
    "reachable",
    "roundtrip_error",
    "saturated_units",
    "sharpness",
    "signal_gain",
    "target_scale",
    "unit_gradients",
    "update_ratios",
    "value_and_grad",
    "value_and_grad_with_noise",
    "weight_decay",
    "weight_stats",
    "width_profile",
    "worst_examples",
    "wraparound",
    "z_scores",
]

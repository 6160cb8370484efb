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
from nnsanity.findings import DiagnosisError, Finding
from nnsanity.lint import lint
from nnsanity.monitor.state import MonitorRecord, MonitorState
from nnsanity.monitor.watch import Monitor, monitor
from nnsanity.monitor.wrapping import MonitoredState
from nnsanity.quantities.activations import Activations, activations
from nnsanity.quantities.clipped import BlockedShare, blocked_share
from nnsanity.quantities.clipping import Clipping, clipping
from nnsanity.quantities.columns import Wraparound, wraparound
from nnsanity.quantities.curvature import Sharpness, sharpness
from nnsanity.quantities.dead import DeadUnits, dead_units, merge_dead_units
from nnsanity.quantities.dependence import (
    ExampleIndependence,
    InputDependence,
    example_independence,
    input_dependence,
)
from nnsanity.quantities.dormant import DormantUnits, dormant_units, merge_dormant_units
from nnsanity.quantities.errors import (
    ConstantBaseline,
    WorstExamples,
    constant_baseline,
    worst_examples,
)
from nnsanity.quantities.example_norms import example_gradient_norms
from nnsanity.quantities.gradient_sizes import GradientStats, gradient_stats
from nnsanity.quantities.microbatch_noise import microbatch_noise_scale
from nnsanity.quantities.moments import (
    Moments,
    denormalize,
    feature_moments,
    group_moments,
    merge_moments,
    normalize,
    z_scores,
)
from nnsanity.quantities.neighbors import Continuity, continuity
from nnsanity.quantities.noise_average import (
    NoiseAverage,
    add_noise,
    averaged_noise,
    noise_average,
)
from nnsanity.quantities.noise_estimate import NoiseScale
from nnsanity.quantities.noise_scale import (
    gradient_noise_scale,
    leaf_noise_scales,
    value_and_grad_with_noise,
)
from nnsanity.quantities.outliers import Outliers, outliers
from nnsanity.quantities.overfit import Overfit, overfit_batch
from nnsanity.quantities.rate_curves import LRRange, LRSweep, lr_range, lr_sweep
from nnsanity.quantities.representation import (
    Invariance,
    RoundtripError,
    invariance,
    roundtrip_error,
)
from nnsanity.quantities.saturated import (
    SaturatedUnits,
    merge_saturated_units,
    saturated_units,
)
from nnsanity.quantities.scales import (
    Normalization,
    TargetScale,
    normalization,
    target_scale,
)
from nnsanity.quantities.signal_gain import SignalGain, signal_gain, unit_gradients
from nnsanity.quantities.training_noise import LossNoise, noise
from nnsanity.quantities.weight_sizes import (
    WeightStats,
    layer_update_ratios,
    weight_stats,
)
from nnsanity.report import Report
from nnsanity.signals import Signals, value_and_grad
from nnsanity.tracing.averaged import averaged_terms
from nnsanity.tracing.bounds import Bounds, output_bounds
from nnsanity.tracing.layers import Layer, Uninspected, layers
from nnsanity.tracing.noise import Dropout, dropout_rates
from nnsanity.tracing.nonfinite import Birth, FirstNonfinite, Places, first_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Activations",
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
    "MonitorRecord",
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
    "layer_update_ratios",
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
    "microbatch_noise_scale",
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

"""Item 10: is the network deeper than what it can train?

"Start with 3 to 8 layers; a deep network will not work where a shallow one learned
nothing" (D. Holden).
"""

from nnsanity.findings import Finding

USUAL_DEPTH = 8
"""Layers in a row up to which depth by itself is not suspected (D. Holden)."""


def too_deep(num_layers: int) -> Finding:
    """The finding that a copy with skip connections learns."""
    return Finding(
        "depth/too-deep",
        10,
        "info",
        f"{num_layers} layers",
        float(num_layers),
        float(USUAL_DEPTH),
        f"{num_layers} layers in a row lose the signal on their way.",
        "Take fewer layers: start with 3. Or add skip connections, x + layer(x), and"
        " normalization layers.",
    )

"""Finds the biases of layers: parameters that are only added to what a layer makes."""

from nnsanity.tracing.layers import Located, Network


def is_bias(network: Network, one: Located, leaf: int) -> bool:
    """Tells whether a leaf is only added to what the layer makes."""
    steps = [step for stage in one.stages for step in stage.steps]
    uses = [
        step
        for step in steps
        if any(
            leaf in network.steps.origins[value].parameters
            for value in network.steps.weights(step)
        )
    ]
    return bool(uses) and all(step.eqn.primitive.name == "add" for step in uses)


def bias_value(network: Network, one: Located) -> int | None:
    """Finds the value that is added to a layer's sums as its bias."""
    for step in (step for stage in one.linear_stages for step in stage.steps):
        for value in network.steps.weights(step):
            leaves = network.steps.origins[value].parameters - {one.weight}
            if leaves and all(is_bias(network, one, leaf) for leaf in leaves):
                return value
    return None

"""Settings of all tests: CPU, one device, no chance.

JAX_NUM_CPU_DEVICES=8 in the environment runs them on eight devices.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("nnsanity", derandomize=True, deadline=None)
hypothesis.settings.load_profile("nnsanity")


@pytest.fixture
def strict_jax():
    """Within it JAX promotes neither dtypes nor ranks on its own."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield

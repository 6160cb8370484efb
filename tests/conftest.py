"""Settings of all tests: CPU, one device, no chance.

JAX_NUM_CPU_DEVICES=8 in the environment runs them on eight devices.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

import nnsanity  # noqa: F401

MAX_MAPS = 20_000
# What a checkup finds must not depend on how busy the machine is.
sys.modules["nnsanity.checkup"].BUDGET_SECONDS = 1e6
sys.modules["nnsanity.trials.interventions"].VERY_SLOW_SECONDS = 1e6

hypothesis.settings.register_profile("nnsanity", derandomize=True, deadline=None)
hypothesis.settings.load_profile("nnsanity")


@pytest.fixture
def strict_jax():
    """Within it JAX promotes neither dtypes nor ranks on its own."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they take more memory maps than Linux allows."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MAX_MAPS:
        jax.clear_caches()

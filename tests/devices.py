"""Runs a script with several devices, which has to be said before JAX starts."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nnsanity


def printed_with_devices(script, num_devices):
    """Returns what a script prints as JSON."""
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(nnsanity.__file__).parents[1]),
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

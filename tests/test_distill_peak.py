"""What is stated before the work is what the work takes, for three shapes of model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peak_memory import SHAPES


@pytest.mark.fuzz
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_memory_that_is_stated_is_what_is_used(shape: str) -> None:
    script = Path(__file__).parent / "support" / "peak_memory.py"
    done = subprocess.run([sys.executable, str(script), shape], check=True,
                          capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stated"] > 300 * 2**20
    assert abs(found["used"] / found["stated"] - 1) < 0.15, done.stderr

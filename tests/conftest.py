"""What all tests share: no network, one thread, how many examples, and the way to the real models and corpora."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from real_assets import ASSETS

# Before anything imports huggingface_hub, which reads it once: tests must not depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything loads torch: there is one worker for each core, and models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `examples(60)` draws 60 examples under "fuzz", and this percentage of them under the other profiles.
for name, percent in (("few", 20), ("fuzz", 100)):
    settings.register_profile(name, max_examples=percent, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("few")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real models and corpora; the test is skipped where there is none."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs real models and corpora; {ASSETS} is no folder (set VOCABEXT_ASSETS)")
    return ASSETS

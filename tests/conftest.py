"""What all tests share: no network, and the way to the real models and corpora."""

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once: tests must not depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS", Path(__file__).parent.parent.parent / "shared" / "assets"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real models and corpora; the test is skipped where there is none."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs real models and corpora; {ASSETS} is no folder (set VOCABEXT_ASSETS)")
    return ASSETS

"""Where real models and corpora lie."""

import os
from pathlib import Path

ASSETS = Path(os.environ.get("VOCABEXT_ASSETS") or Path(__file__).resolve().parents[2] / ".." / "shared" / "assets")

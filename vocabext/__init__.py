"""Give a language model names for the words of your domain, without retraining it."""

from typing import Final

__version__: Final = "0.3.0"

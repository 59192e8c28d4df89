"""slimnas: vision transformers that run in N milliseconds on your device."""

__version__ = "0.1.0"

"""Which version this is; where it was unpacked and never installed, nothing else tells."""

__version__ = "0.1.0"

"""The one place that holds the version: read by setuptools when building, and by whoever asks at run time."""

__version__ = "0.2.0.dev0"

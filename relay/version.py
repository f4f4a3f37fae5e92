"""The one place that holds the version: read by setuptools when building, and by whoever asks at run time."""

from pathlib import Path

__version__ = "0.2.0.dev0"


def on_disk() -> str:
    """The version in this file as it is now: another one may have been installed since this process has read it."""
    try:
        text = Path(__file__).read_text(encoding="utf-8")
    except OSError:
        return __version__
    _, _, rest = text.partition('__version__ = "')
    return rest.partition('"')[0] or __version__

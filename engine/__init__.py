"""The daemon: policy files, event loop, live model, checkpoints, releases, metrics, admin pages, command line."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("adaptd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

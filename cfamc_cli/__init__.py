"""cfamc: train vision encoders without labels that stay right under attack, and prove it."""

from importlib.metadata import version

__version__ = version("cfamc")

"""Programs of the loss language in Triton."""

from .run import run, scale, source, spread

__all__ = ["run", "scale", "source", "spread"]

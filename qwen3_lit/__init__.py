"""Modular Lightning recipes for the whole Qwen3 training pipeline."""

__version__ = "0.1.0"

"""Adapters on disk: a model's adapter, an adapter's directory, PEFT's format, the model card."""

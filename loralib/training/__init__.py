"""Training with transformers: the trainer, its batches, its precision, its metrics."""

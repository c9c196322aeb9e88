"""Data, evaluation and the glue to ``transformers.Trainer``."""

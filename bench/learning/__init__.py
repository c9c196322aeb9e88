"""A study of how well small models learn: ways of fine-tuning, compared on the same tasks."""

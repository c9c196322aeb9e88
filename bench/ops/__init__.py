"""Every operation and backend against its rivals, on the shapes of real models."""

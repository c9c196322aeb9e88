"""The thin model layer: frozen backbones, the ladder, and both together."""

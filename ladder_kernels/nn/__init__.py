"""Modules on top of the operations."""

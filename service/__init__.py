"""Limpid: a REST microservice around one learned codec that compresses and restores a photo at once."""

__version__ = "0.1.0"

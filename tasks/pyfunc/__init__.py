"""Models-from-code: scripts that MLflow runs to load a registered version, without pickle."""

"""Models-from-code: the scripts that MLflow runs to load a registered version. No pickle."""

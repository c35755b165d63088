"""Adapters to the outside world: storage, downloads, Ray, MLflow, settings. Independent of the models."""

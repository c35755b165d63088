"""The world outside: storage, downloads, Ray, MLflow, settings. Knows no neural network."""

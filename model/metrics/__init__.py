"""Metrics on embeddings and images, with confidence intervals."""

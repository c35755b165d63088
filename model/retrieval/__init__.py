"""Databases of embeddings: which index, how to search it, how well it answers."""

"""Databases of embeddings: which index, how to search it, how well it answers."""

from model.retrieval import limits as limits  # sets FAISS's limits before anything here reads an index

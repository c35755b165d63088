"""Embedding databases: choice of index, search, tuning and recall."""

from model.retrieval import limits as limits  # sets FAISS's limits before any index is read

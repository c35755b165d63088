"""Promotion of registered versions: gates, decisions and rollbacks."""

"""Prefect flows: the order of the stages. The work is done in :mod:`tasks`."""

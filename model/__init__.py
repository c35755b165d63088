"""Maths and networks. No storage, no orchestrator: tensors, arrays and local paths in and out."""

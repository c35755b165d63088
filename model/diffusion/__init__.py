"""Noise to pictures: the condition, flow matching, guidance."""

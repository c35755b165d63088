"""Diffusion processes: conditioning, flow matching, VQ-Diffusion, guidance, solver."""

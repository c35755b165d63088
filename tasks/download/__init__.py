"""Download stage."""

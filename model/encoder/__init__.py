"""CLIP encoders and the identity of their embedding spaces."""

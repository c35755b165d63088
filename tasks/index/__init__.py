"""Index stage: build, tune and measure a FAISS database version from embedding shards."""

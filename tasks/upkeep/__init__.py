"""Changes to existing databases: takedown, compaction, merge, subset, garbage collection."""

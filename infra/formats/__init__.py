"""File formats: arrays, Parquet tables, URL lists and webdataset tars."""

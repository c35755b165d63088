"""Parquet tables and webdataset tars."""

"""The service without HTTP: requests are queued, batched and answered by one model and several databases."""

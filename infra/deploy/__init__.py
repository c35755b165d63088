"""Services of a deployment on one machine: Prefect server and worker, MLflow server, Ray head."""

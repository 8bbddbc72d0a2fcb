"""The wire contract between a backend and the GPU consumers: pydantic and the standard library, nothing else."""

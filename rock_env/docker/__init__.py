"""The Docker backend of the sandboxes; see rock_env.docker.backend."""

"""The supervisor process that owns a client's sandboxes. Standard library only; single-threaded."""

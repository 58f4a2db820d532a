"""The egress proxy: the only way out of a sandbox whose policy is not closed. A process of its own, outside."""

"""A model for the agent inside a sandbox: an OpenAI- and Anthropic-compatible endpoint on its loopback, whose requests
are answered by whoever trains or serves outside. `process` runs beside the supervisor; `client` is the SDK's side."""

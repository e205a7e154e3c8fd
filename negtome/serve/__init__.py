"""An OpenAI-compatible server of images that decides every request by a policy first; see docs/serve.md."""

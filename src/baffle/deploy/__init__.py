"""Training across machines: a SuperLink, warm clients, and the app that runs between them. See ``docs/deploy.md``."""

"""Training across machines: SuperLink, stateful clients, and the app that runs between them. See ``docs/deploy.md``."""

"""The server's side."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from baffle.deploy.server_app import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, or continue a run folder."""
    serve(grid, context)

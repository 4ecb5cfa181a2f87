"""A client's side, for SuperNodes and simulation; ``baffle node`` does not run it."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from baffle.deploy.client_app import answer

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a task with K integers."""
    return answer(message, context)

"""The command line: `slipstream serve`, `pull`, `chat`."""

from slipstream.lasting import lasting


def main() -> None:
    """Run the command line."""
    with lasting():
        from slipstream.cli.app import app  # when nothing looks for garbage among what it imports

    app()


__all__ = ["main"]

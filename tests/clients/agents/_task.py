"""What every agent in this folder is told: where the server is, and what to ask."""

import os

URL = os.environ["SLIPSTREAM_URL"]
PROMPT = os.environ["PROMPT"]
SYSTEM = os.environ["SYSTEM"]
MODEL = "scripted"
KEY = "none"


def look_up(city: str) -> str:
    """Look up the weather in a city."""
    return f"It is sunny in {city}, with light winds from the north and no rain expected before the evening."

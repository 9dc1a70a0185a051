"""The API process: text in and out, HTTP, and messages to the engine."""

"""The table of commands: where each lives and what it does in a line, so that `max --help` imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CommandEntry:
    """A command: its module, which holds the click command as `attribute`, and its line in the help."""

    module: str
    summary: str
    takes_model: bool = False
    """Whether it takes the settings of a model, and so refuses by name those that are planned."""
    attribute: str = "command"


COMMANDS = {
    "cache": CommandEntry(".cache", "Look into the cache of compiled models, check, share and trim it."),
    "generate": CommandEntry(".generate", "Generate text from a model and a prompt, without a server.", True),
    "list": CommandEntry(".list", "List the model architectures that can be run."),
    "serve": CommandEntry(".serve", "Serve a model over HTTP, as the OpenAI API does.", True),
    "warm-cache": CommandEntry(".warm_cache", "Compile a model ahead of time and keep the result.", True),
}

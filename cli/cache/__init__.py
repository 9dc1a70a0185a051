"""`max cache`: the cache of compiled models, for people who operate it."""

from __future__ import annotations

from ..commands import CommandEntry
from ..lazy_group import LazyGroup

SUBCOMMANDS = {
    "diff": CommandEntry(".comparison", "Show the factors in which two entries differ.", attribute="diff"),
    "doctor": CommandEntry(".doctor", "Check folder, permissions, locks, file system, orphans and versions."),
    "explain": CommandEntry(
        ".comparison", "Say whether a model would be found, and if not, why.", True, attribute="explain"
    ),
    "export": CommandEntry(".exchange", "Write entries into one file for another host.", attribute="export"),
    "import": CommandEntry(".exchange", "Keep the artifacts of such a file.", attribute="import_"),
    "inspect": CommandEntry(".inspection", "Show what is in an artifact, or print a section of it."),
    "key": CommandEntry(".signing", "Make and show the keys that sign artifacts.", attribute="key"),
    "ls": CommandEntry(".listing", "List the entries.", attribute="ls"),
    "pin": CommandEntry(".upkeep", "Keep entries whatever the bounds of the cache.", attribute="pin"),
    "prune": CommandEntry(".upkeep", "Remove what is old, too much, damaged or left over.", attribute="prune"),
    "pull": CommandEntry(".exchange", "Keep artifacts of the remote.", attribute="pull"),
    "push": CommandEntry(".exchange", "Write entries to the remote.", attribute="push"),
    "sign": CommandEntry(".signing", "Vouch for artifacts with a private key.", attribute="sign"),
    "stats": CommandEntry(".listing", "Sum up what the cache holds.", attribute="stats"),
    "unpin": CommandEntry(".upkeep", "Let pinned entries go when their time comes.", attribute="unpin"),
    "verify": CommandEntry(".verification", "Compare every hash, and try artifacts with --run."),
}

command = LazyGroup(
    table=SUBCOMMANDS,
    package=__package__ or "",
    name="cache",
    help="""Look into the cache of compiled models, check, share and trim it.

    An entry is named by the first digits of its key, as `max cache ls` shows it.

    \b
    max cache ls
    max cache explain --model ./llama --max-length 4096
    max cache verify --run
    """,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

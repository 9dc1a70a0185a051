"""docs/cli.md is what the commands say of themselves."""

from pathlib import Path

from max.cli.document import document

WRITTEN = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_document_is_that_of_the_commands() -> None:
    assert WRITTEN.read_text() == document(), "run `python -m max.cli.document > docs/cli.md`"


def test_options_and_refusals_are_in_it() -> None:
    text = document()
    assert "## max generate" in text
    assert "| `--cache-policy [on\\|off\\|readonly\\|redo\\|require]` |" in text
    real, _, planned = text.partition("## Planned")
    assert "--speculative-method" not in real
    assert "`--speculative-method`" in planned
    assert "`--max-batch-size`" not in planned

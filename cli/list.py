"""`max list`: the architectures there are, from data alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..models.table import ARCHITECTURES, Architecture


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """List the model architectures that can be run, with examples, encodings and cache strategies."""
    if as_json:
        click.echo(json.dumps({"architectures": {name: _row(row) for name, row in ARCHITECTURES.items()}}, indent=2))
        return
    for row in ARCHITECTURES.values():
        click.echo(f"{row.name}")
        click.echo(f"  tasks             {', '.join(row.tasks)}")
        click.echo(f"  encodings         {', '.join(row.encodings)}")
        click.echo(f"  cache strategies  {', '.join(row.cache_strategies)}")
        click.echo(f"  examples          {row.example_repo_ids[0]}")
        for example in row.example_repo_ids[1:]:
            click.echo(f"                    {example}")


def _row(row: Architecture) -> dict[str, list[str]]:
    facts = {name: list(value) for name, value in asdict(row).items() if isinstance(value, tuple)}
    return {"example_repo_ids": facts.pop("example_repo_ids"), "supported_encodings": facts.pop("encodings"), **facts}

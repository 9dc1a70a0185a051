"""`max list`: the architectures there are, and the targets to compile for, from data alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from ..models.table import ARCHITECTURES, Architecture


@click.command()
@click.option("--targets", is_flag=True, help="List what `max warm-cache --target` takes instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(targets: bool, as_json: bool) -> None:
    """List the model architectures that can be run, with examples, encodings and cache strategies.

    With --targets, list the hardware to compile for: what each needs installed, and whether code for it can be compiled
    and run on this host.
    """
    if targets:
        _list_targets(as_json)
        return
    if as_json:
        click.echo(json.dumps({"architectures": {name: _row(row) for name, row in ARCHITECTURES.items()}}, indent=2))
        return
    for row in ARCHITECTURES.values():
        click.echo(f"{row.name}")
        click.echo(f"  tasks             {', '.join(row.tasks)}")
        click.echo(f"  encodings         {', '.join(row.encodings)}")
        click.echo(f"  weights in        {', '.join(row.formats)}")
        click.echo(f"  cache strategies  {', '.join(row.cache_strategies)}")
        click.echo(f"  examples          {row.example_repo_ids[0]}")
        for example in row.example_repo_ids[1:]:
            click.echo(f"                    {example}")


def _list_targets(as_json: bool) -> None:
    from ..compiler.targets.listing import target_rows

    rows = list(target_rows())
    if as_json:
        click.echo(json.dumps({"targets": {row.target: row.to_json() for row in rows}}, indent=2))
        return
    click.echo(f"{'target':<20}{'compiles here':<15}{'runs here':<11}hardware")
    for row in rows:
        compiles, runs = ("yes" if row.can_compile else "no"), ("yes" if row.can_run else "no")
        also = f"  [{', '.join(row.default_for)}]" if row.default_for else ""
        click.echo(f"{row.target:<20}{compiles:<15}{runs:<11}{row.hardware}{also}".rstrip())
    for install in dict.fromkeys(row.install for row in rows if row.install):
        names = [row.target for row in rows if row.install == install]
        click.echo(f"to compile for {', '.join(names)}: {install}")
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        click.echo(reason)


def _row(row: Architecture) -> dict[str, list[str]]:
    facts = {name: list(value) for name, value in asdict(row).items() if isinstance(value, tuple)}
    return {"example_repo_ids": facts.pop("example_repo_ids"), "supported_encodings": facts.pop("encodings"), **facts}

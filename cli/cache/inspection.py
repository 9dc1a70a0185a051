"""`max cache inspect`: what is in an artifact, and any of its sections in a readable form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ... import ConfigError
from ...cache import mef
from ...cache.catalog import Entry, find
from ...cache.config import CacheConfig
from ...cache.store import Store
from .options import cache_command, print_json
from .table import print_table, size

_ALIASES = {"stablehlo": mef.MODULE}


@cache_command()
@click.argument("name", metavar="ENTRY|FILE")
@click.option("--section", metavar="KIND[/NAME]", help="Print this section, such as stablehlo, manifest or jaxpr/NAME.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the section's own bytes to this file.")
def command(
    config: CacheConfig, store: Store, as_json: bool, name: str, section: str | None, output: Path | None
) -> None:
    """Show what is in an artifact, or print a section of it.

    Sections with their sizes; graphs with operations, bytes moved and memory of one call; where it came from, what it
    needs, who signed it. An artifact is an entry of the cache or a file.

    \b
    max cache inspect 3f2a
    max cache inspect 3f2a --section stablehlo
    max cache inspect ./exported/llama.mef --json
    """
    artifact, entry = _opened(store, name)
    if section is None and output is not None:
        raise ConfigError("--output writes a section, and none is named", "Name one with --section.")
    if section is not None:
        _print_section(artifact, section, output)
        return
    facts = _facts(artifact, entry)
    if as_json:
        print_json(facts)
    else:
        _show(facts)


def _opened(store: Store, name: str) -> tuple[mef.Mef, Entry | None]:
    if Path(name).is_file():
        return mef.Mef.open(name), None
    entry = find(store, name)
    return mef.Mef.open(store.blob_path(entry.record.mef)), entry


def _print_section(artifact: mef.Mef, wanted: str, output: Path | None) -> None:
    kind, _, name = wanted.partition("/")
    kind = _ALIASES.get(kind, kind)
    found = [each for each in artifact.sections() if each.kind == kind and name in ("", each.name)]
    if not found:
        there = ", ".join(dict.fromkeys(each.kind for each in artifact.sections()))
        raise ConfigError(f"there is no section {wanted}", f"There are: {there}; and KIND/NAME of several.")
    if output is not None or (kind == mef.NATIVE and not sys.stdout.isatty()):
        if len(found) > 1:
            raise ConfigError(f"there are {len(found)} sections {kind}", f"Name one, such as {kind}/{found[0].name}.")
        data = artifact.read(found[0])
        output.write_bytes(data) if output is not None else sys.stdout.buffer.write(data)
        return
    if kind == mef.NATIVE:
        raise ConfigError("native code is not printed to a terminal", "Write it to a file with --output.")
    for each in found:
        if len(found) > 1:
            click.echo(f"# {each.kind}/{each.name}")
        click.echo(_readable(artifact.read(each), kind))


def _readable(data: bytes, kind: str) -> str:
    if kind == mef.MODULE:
        from ...compiler import xla_lowering

        return str(xla_lowering.from_portable_bytecode(data))
    if kind == mef.JAXPR:
        return data.decode(errors="replace")
    return json.dumps(json.loads(data), indent=2)


def _facts(artifact: mef.Mef, entry: Entry | None) -> dict[str, Any]:
    present = {section.kind for section in artifact.sections()}

    def section(kind: str) -> Any:
        return artifact.json(kind) if kind in present else {}

    manifest = section(mef.MANIFEST)
    return {
        "artifact": artifact.id,
        "bytes": artifact.size,
        "name": manifest.get("name", ""),
        "target": manifest.get("target", ""),
        "compat": section(mef.COMPAT),
        "entry": entry.to_json() if entry else None,
        "sections": [
            {
                "kind": each.kind,
                "name": each.name,
                "target": each.target,
                "offset": each.offset,
                "stored_bytes": each.stored_bytes,
                "raw_bytes": each.raw_bytes,
                "codec": each.codec,
                "sha256": each.sha256,
            }
            for each in artifact.sections()
        ],
        "graphs": _graphs(
            manifest.get("graphs", {}),
            section(mef.COST),
            section(mef.MEMORY),
            {each.name: each.raw_bytes for each in artifact.sections() if each.kind == mef.NATIVE},
        ),
        "custom_calls": section(mef.CUSTOM_CALLS) or [],
        "provenance": section(mef.PROVENANCE),
    }


def _graphs(
    graphs: dict[str, Any], cost: dict[str, Any], memory: dict[str, Any], code: dict[str, int]
) -> list[dict[str, Any]]:
    """Each graph with the sums over its calls, and the most temporary memory that one of them takes.

    XLA counts -1 for a call of a kernel, whose operations it does not know.
    """
    found = []
    for name, graph in graphs.items():
        calls = [call[0] for call in graph["calls"]]
        found.append(
            {
                "name": name,
                "calls": len(calls),
                "executables": len(set(calls)),
                "flops": sum(max(0, cost.get(call, {}).get("flops", 0)) for call in calls),
                "bytes": sum(max(0, cost.get(call, {}).get("bytes", 0)) for call in calls),
                "temporary_bytes": max((memory.get(call, {}).get("temporary", 0) for call in calls), default=0),
                "code_bytes": sum(code.get(call, 0) for call in set(calls)),
            }
        )
    return found


def _show(facts: dict[str, Any]) -> None:
    entry, provenance, compat = facts["entry"], facts["provenance"], facts["compat"]
    click.echo(f"artifact    {facts['artifact']}  {size(facts['bytes'])}")
    click.echo(f"name        {facts['name']} for {facts['target']}")
    if entry:
        marks = ", ".join(["pinned"] * entry["pinned"] + [f"signed by {signer}" for signer in entry["signers"]])
        click.echo(f"key         {entry['key']}  {marks}".rstrip())
        for path in entry["checkpoints"]:
            click.echo(f"checkpoint  {path}")
    if compat:
        needs, devices = compat.get("requires"), compat.get("devices", 1)
        platform = f"{devices} devices of {compat.get('target')}" if devices > 1 else compat.get("platform", "")
        sets = f", {len(needs)} instruction sets: {' '.join(needs)}" if needs else ""
        click.echo(f"needs       {platform}{sets}")
    if facts["custom_calls"]:
        click.echo(f"handlers    {', '.join(facts['custom_calls'])}")
    if provenance:
        seconds = ", ".join(f"{phase} {value} s" for phase, value in provenance.get("seconds", {}).items())
        tools = ", ".join(f"{name} {version}" for name, version in provenance.get("toolchain", {}).items())
        click.echo(
            f"made        {provenance.get('created', '')} by {' '.join(provenance.get('command', []))} ({seconds})"
        )
        click.echo(f"with        {tools}")
    click.echo()
    rows = [
        [each["name"], str(each["calls"]), str(each["executables"]), f"{each['flops'] / 1e6:,.1f}"]
        + [size(each[name]) for name in ("bytes", "temporary_bytes", "code_bytes")]
        for each in facts["graphs"]
    ]
    columns = ("graph", "calls", "executables", "Mflop", "moved", "temporary", "code")
    print_table(columns, rows, right=columns[1:])
    click.echo()
    grouped: dict[str, list[dict[str, Any]]] = {}
    for each in facts["sections"]:
        grouped.setdefault(each["kind"], []).append(each)
    rows = [
        [kind, str(len(group)), size(sum(s["stored_bytes"] for s in group)), size(sum(s["raw_bytes"] for s in group))]
        for kind, group in grouped.items()
    ]
    columns = ("section", "count", "stored", "raw")
    print_table(columns, rows, right=columns[1:])

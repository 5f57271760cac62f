"""Findings as SARIF 2.1.0, the interchange format of static analysis (OASIS standard), for code scanning and editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from qcompile.target.findings import Finding, Rule

VERSION = "2.1.0"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(findings: Sequence[Finding], rules: Sequence[Rule], file: str, version: str) -> dict[str, Any]:
    """One run: every rule of the target, and a result for each finding at its node in `file` (a relative name)."""
    index = {rule.id: i for i, rule in enumerate(rules)}
    driver = {"name": "qcompile", "version": version, "rules": [_rule(r) for r in rules]}
    results = [_result(f, index[f.rule], quote(file)) for f in findings]
    run = {"tool": {"driver": driver}, "artifacts": [{"location": {"uri": quote(file)}}], "results": results}
    return {"$schema": SCHEMA, "version": VERSION, "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.title.replace("/", " ").replace(",", "").split()),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.summary},
        "help": {"text": f"What to do: {rule.fix}"},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"effect": rule.effect, "fixable": rule.repair is not None},
    }


def _result(finding: Finding, index: int, uri: str) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri, "index": 0}}}
    if finding.node:
        location["logicalLocations"] = [{"name": finding.node, "fullyQualifiedName": finding.node, "kind": "element"}]
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {"text": f"{finding.message}; {finding.fix}"},
        "locations": [location],
    }

"""The rules of placement and of the linter, and the pages that tell of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engines import node_rules, pair_rules
from engines.lint import RULES as LINT_RULES
from engines.lint_rules import Rule

DOCS = Path(__file__).parents[2] / "docs"


def table_rows(page: str) -> dict[str, list[str]]:
    """The rows of a page's tables whose first cell is a word in code, by that word."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize("rule", [*node_rules.RULES, *pair_rules.RULES], ids=lambda rule: rule.name)
def test_a_rule_of_placement_stands_in_the_docs(rule: node_rules.NodeRule | pair_rules.PairRule) -> None:
    """With its sentence and its source."""
    rows = [line for line in (DOCS / "placement.md").read_text().splitlines() if line.startswith(f"| `{rule.name}` |")]

    assert any(rule.why in row and rule.source in row for row in rows)


@pytest.mark.parametrize("rule", LINT_RULES, ids=lambda rule: rule.name)
def test_a_rule_of_the_linter_stands_in_the_docs(rule: Rule) -> None:
    """With its severity, what it costs and what to do."""
    row = table_rows("lint.md")[rule.name]

    assert row[1].split(",")[0] == rule.severity
    assert row[3] == rule.cost
    assert row[4].startswith(rule.fix)


def test_the_docs_tell_of_no_rule_that_is_gone() -> None:
    """Every rule in the pages' tables exists."""
    modes = {"static", "dynamic", "weight-only", "--mode"}
    known = {rule.name for rule in (*node_rules.RULES, *pair_rules.RULES)}

    assert set(table_rows("placement.md")) - modes <= known
    assert set(table_rows("lint.md")) == {rule.name for rule in LINT_RULES}

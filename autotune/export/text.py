"""How the files of a best folder are written: JSON, YAML, and templates."""

import json
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATES = Environment(
    loader=PackageLoader("autotune", "formats/templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # shell and Markdown, not HTML
)


def as_json(document: Any) -> str:
    """A JSON document."""
    return json.dumps(document, indent=2) + "\n"


def as_yaml(document: Any) -> str:
    """A YAML document, its keys in their order."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)

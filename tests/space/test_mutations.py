"""Any bytes at all in place of a search space: it is read, or refused in one sentence that names the file."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.errors import AutotuneError
from autotune.space.file import read_space_file
from autotune.space.space import load_space
from tests.samples import SPACE, space_text

SHIPPED = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
KEYED = space_text(search={"zero_stage": [1, 3], "deepspeed": {"zero_optimization.reduce_bucket_size": [1000, 2000]}})
# The shipped spaces for GPUs have thousands of candidates, so they are drawn less often.
BASES = [*[space_text()] * 18, *[KEYED] * 12, *[path.read_text(encoding="utf-8") for path in SHIPPED]]

FRAGMENTS = (
    "\t", "\x00", "\x07", "\r", "\x85", "\u2028", "\ufeff", "\U0001f4a5", "'", '"', "%YAML 9.9\n", "\n---\n", "\n...\n",
    "&a ", "*a", "*nowhere", "&a [*a]", "? [x]\n: y\n", "? {a: b}\n: c\n", "<<: {study: merged}\n", "<<: [1, 2]\n",
    "!!python/object/apply:os.system ['touch was-here']", "!!python/name:os.system ", "!!int ''", "!!int _", "!!bool x",
    "!!float ''", "!!timestamp x", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!unknown ", "2001-99-99",
    "2001-01-01T00:00:00+99:99", "1:59:59:59", "0x" + "f" * 9000, "9" * 9000, "[" * 3000, "{a: " * 400, "- " * 400,
    "x" * 20_000, '"\\uD800"', '"\\x00\\n"', ".nan", ".inf", "-.inf", "1e999", "~", "[]", "{}", "|\n  text\n",
)  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 70)
    | st.sampled_from([10**9, 10**9 + 1, 10**30, -(10**30), 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf")])
    | st.text(max_size=12)
    | st.sampled_from(["x" * 5000, "a\nb", "\x1b[31m", "1e5", "1e999", "3GiB", "9" * 400 + "GiB", "~nobody/x", "n/a"])
    | st.sampled_from(
        [datetime.date(2024, 2, 29), b"\xff\x00", "deepspeed", "bf16", "fp16", "cpu", "H100-80GB", "auto"]
    )
)
keys = (
    st.text(max_size=8) | st.integers() | st.none() | st.booleans() | st.sampled_from(["x" * 2000, "a.b", "int", "[]"])
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@st.composite
def restructured(draw: st.DrawFn) -> str:
    """A space with keys and values deleted, renamed, moved, retyped, multiplied."""
    document: Any = yaml.safe_load(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        if not (where := places(document)):
            break
        container, key = draw(st.sampled_from(where))
        value = container[key]
        kind = draw(st.sampled_from(["junk", "delete", "rename", "list", "dict", "empty", "number", "repeat", "move"]))
        if kind == "delete":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw(keys)] = container.pop(key)
        elif kind == "list":
            container[key] = [value]
        elif kind == "dict":
            container[key] = {draw(keys): value}
        elif kind == "empty":
            container[key] = draw(st.sampled_from([[], {}, "", None]))
        elif kind == "number" and isinstance(value, int):
            container[key] = draw(st.sampled_from([-value, value * 10**9, value * 10**30, float(value), str(value)]))
        elif kind == "repeat" and isinstance(value, list):
            container[key] = value * draw(st.sampled_from([2, 2000]))
        elif kind == "move":
            other, place = draw(st.sampled_from(where))
            container[key] = yaml.safe_load(yaml.safe_dump(other[place])) if place in dict(_items(other)) else None
        else:
            container[key] = draw(junk)
    return yaml.dump(document, sort_keys=False, allow_unicode=draw(st.booleans()))


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


@st.composite
def scribbled(draw: st.DrawFn) -> bytes:
    """A space whose bytes were edited by somebody who knows YAML's corners."""
    text = draw(st.sampled_from(BASES) | restructured())
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["insert", "insert", "value", "line twice", "cut", "swap"]))
        at = draw(st.integers(0, len(text)))
        lines = text.splitlines(keepends=True)
        if kind == "insert":
            text = text[:at] + draw(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"])) + text[at:]
        elif kind == "value" and (colon := text.find(": ", at)) >= 0:
            text = text[: colon + 2] + draw(st.sampled_from(FRAGMENTS)) + text[colon + 2 :]
        elif kind == "line twice" and lines:
            line = draw(st.integers(0, len(lines) - 1))
            text = "".join([*lines[: line + 1], *lines[line:]])
        elif kind == "cut":
            text = text[:at] + text[at + draw(st.integers(1, 60)) :]
        elif kind == "swap" and lines:
            text = "".join(draw(st.permutations(lines)))
    data = text.encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
    return data


def read_or_refuse(path: Path) -> str:
    """What reading the file says; empty where it is a space that can be used."""
    try:
        file, text = read_space_file(path)
        space = load_space(path) if file.cluster != "auto" else None
    except AutotuneError as error:
        message = str(error)
        assert str(path) in message
        assert message.isprintable(), message
        assert len(message) < 600, message
        return message
    assert text
    if space is not None:
        assert len(space.identity) == len(space.candidates[0].fingerprint) == 16
        assert space.candidates[0] in space
        assert isinstance(space.dropped, tuple)
    return ""


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of one idle core
@given(restructured() | scribbled())
@settings(
    max_examples=2000, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_2000_mutated_files(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    read_or_refuse(path)
    assert not Path("was-here").exists()


def _bomb(anchor: str, joined: str) -> str:
    levels = [f"l0: &l0 {anchor}"]
    levels += [f"l{n}: &l{n} {joined.format(', '.join([f'*l{n - 1}'] * 10))}" for n in range(1, 10)]
    return "\n".join(levels)


THOUSAND = list(range(1, 1001))
MANY_AXES = {f"zero_optimization.key{n}": THOUSAND for n in range(10)}
BOMBS = {
    "billion laughs": (_bomb("[x]", "[{}]"), "aliases repeat too much"),
    "merge bomb": (_bomb("{x: y}", "{{<<: [{}]}}"), "aliases repeat too much"),
    "a list within itself": ("study: &a [*a]", "aliases repeat too much"),
    "deep": ("[" * 20_000, "nested too deeply"),
    "a billion combinations": (
        space_text(search={"micro_batch_size": THOUSAND, "selective_every": THOUSAND[1:], "gpus": THOUSAND}),
        "micro_batch_size (1000 values), gpus (1000 values), selective_every (999 values)",
    ),
    "a million combinations for one rule": (
        space_text(search={"micro_batch_size": THOUSAND, "gpus": THOUSAND}),
        "micro_batch_size x gpus have 1,000,000 combinations",
    ),
    "a million combinations": (
        space_text(
            search={
                "micro_batch_size": THOUSAND,
                "activation_checkpointing": ["none", "selective"],
                "selective_every": THOUSAND[1:],
            }
        ),
        "",
    ),
    # JSON is YAML, and shorter.
    "ten axes of a thousand": (json.dumps({**SPACE, "search": {"deepspeed": MANY_AXES}}), "more than a quadrillion"),
    "a long axis": (space_text(search={"micro_batch_size": [*THOUSAND, 1001]}), "at most 1000 values, not 1001"),
    "a thousand wrong values": (space_text(search={"precision": [f"p{n}" for n in THOUSAND]}), "999 more problems"),
    "a long number": (space_text(memory_headroom=0) + "seed: 0x" + "f" * 9000, "is not a key"),
    "an overflowing size": (
        space_text(cluster={"gpus_per_node": 2, "gpu": "cpu", "memory_bytes": "9" * 400}),
        "less than 1 EiB",
    ),
    "a batch beyond counting": (space_text(search={"micro_batch_size": 10**30}), "1000000000"),
    "a key twice": ("study: a\nstudy: b\n", "line 2: is not valid YAML (key 'study' is given twice)"),
}

READ = """
import resource, sys
from pathlib import Path
from tests.space.test_mutations import read_or_refuse
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
base = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (base + 2**29, base + 2**29))
for path in sys.argv[1:]:
    print(read_or_refuse(Path(path)))
"""


def test_files_that_explode_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    paths = []
    for name, (text, _) in BOMBS.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text, encoding="utf-8")
    run = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for message, (name, (_, words)) in zip(run.stdout.splitlines(), BOMBS.items(), strict=True):
        assert words in message, name

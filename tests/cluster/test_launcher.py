"""The files for Ray's cluster launcher, by the schema that Ray ships and by what its launcher itself checks."""

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = ["ray-local.yaml", "ray-aws-p5.yaml", "ray-gcp-a3.yaml"]
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return config


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_it(name: str) -> None:
    config = load(name)
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("name", FILES)
def test_a_planted_mistake_is_found(name: str) -> None:
    config = load(name) | {"workers": 2}
    with pytest.raises(jsonschema.ValidationError, match="workers"):
        jsonschema.validate(config, SCHEMA)
    if name != "ray-local.yaml":
        config = load(name)
        config["head_node_type"] = "no such type"
        with pytest.raises(ValueError, match="head_node_type"):
            validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_it_is_closed_and_of_one_version(name: str) -> None:
    config = load(name)
    starts = [
        command
        for kind in ("head", "worker")
        for command in config[f"{kind}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command and "--disable-usage-stats" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    if "docker" in config:
        assert config["docker"]["image"].endswith(f"-ray{importlib.metadata.version('ray')}")
        head, *workers = config["available_node_types"].values()
        assert head["resources"] == {"CPU": 0}
        assert all(worker["min_workers"] == 0 and worker["resources"]["GPU"] == 8 for worker in workers)

#!/usr/bin/env python3
"""Checks the manifests for Kubernetes against what README.md beside them says. Nothing is applied.

    tests/packaging/kubernetes.py   needs the package PyYAML
"""

import pathlib
import sys

import yaml

FOLDER = pathlib.Path(__file__).parents[2] / "deploy" / "kubernetes"


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def pod():
    daemon = next(d for d in documents("ingest.yaml") if d["kind"] == "DaemonSet")
    assert daemon["spec"]["selector"]["matchLabels"] == daemon["spec"]["template"]["metadata"]["labels"]
    return daemon["spec"]["template"]["spec"]


def every_file_that_is_named_is_there():
    (kustomization,) = documents("kustomization.yaml")
    files = kustomization["resources"] + kustomization["configMapGenerator"][0]["files"]
    assert all((FOLDER / file).is_file() for file in files), files
    names = {volume["configMap"]["name"] for volume in pod()["volumes"] if "configMap" in volume}
    assert names == {kustomization["configMapGenerator"][0]["name"]}


def the_container_can_read_and_nothing_else():
    (container,) = pod()["containers"]
    context = container["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"]} and "add" not in context["capabilities"]
    assert context["readOnlyRootFilesystem"] and context["allowPrivilegeEscalation"] is False
    assert "privileged" not in context
    writable = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"state"}


def every_path_of_the_configuration_is_mounted():
    mounts = [mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]]
    config = (FOLDER / "portcullis.toml").read_text()
    for path in ("/var/lib/portcullis", "/run/portcullis/secrets", "/var/log/pods"):
        assert path in config and any(path.startswith(mount) for mount in mounts), path
    volumes = {volume["name"] for volume in pod()["volumes"]}
    assert volumes == {mount["name"] for mount in pod()["containers"][0]["volumeMounts"]}


failed = 0
for test in (
    every_file_that_is_named_is_there,
    the_container_can_read_and_nothing_else,
    every_path_of_the_configuration_is_mounted,
):
    try:
        test()
        print(f"test kubernetes::{test.__name__} ... ok")
    except Exception as error:  # noqa: BLE001 - any is a failure of the test
        print(f"test kubernetes::{test.__name__} ... FAILED")
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        failed = 1
sys.exit(failed)

"""The container image, as far as it can be tried without a container engine: its scripts run, its files fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import trt_int8

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, comments left out and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def defaults() -> dict[str, str]:
    """Build arguments that have one, to their default."""
    return dict(argument.split("=", 1) for argument in arguments("ARG") if "=" in argument)


def mounts() -> list[dict[str, str]]:
    """The mounts of all RUN instructions."""
    texts = [text for run in arguments("RUN") for text in re.findall(r"--mount=(\S+)", run)]
    return [dict((part.split("=", 1) if "=" in part else (part, "")) for part in text.split(",")) for text in texts]


def run(script: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DOCKER / script), *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_step_is_one_script():
    """A RUN step calls one script of this folder and nothing else, so that it can be tried without an engine."""
    steps = [re.sub(r"--mount=\S+\s+", "", step) for step in arguments("RUN")]

    assert steps
    for step in steps:
        assert not re.search(r"[;&|]", step), step
        script = ROOT / step.split()[0].removeprefix("/build/")
        assert script in SCRIPTS, step
    assert {step.split()[0].rpartition("/")[2] for step in steps} == {script.name for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_stop_at_the_first_failure(script: Path):
    """They are executable, parse, and go on after no failed command."""
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_what_is_copied_exists_and_is_sent_to_the_engine():
    """Sources of COPY and of bind mounts are in the repository and not left out by .dockerignore."""
    sources = [source for copy in arguments("COPY") for source in copy.split()[:-1] if not source.startswith("--")]
    sources += [mount["source"] for mount in mounts() if mount["type"] == "bind" and "from" not in mount]
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]

    assert rules[0] == "*"
    assert {"docker/build_pycuda.sh", "constraints.txt", "."} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or any(fnmatch(source.split("/")[0], rule) for rule in kept), source
    assert all((ROOT / rule).exists() for rule in kept)


def test_the_project_is_sent_whole():
    """What the wheel is made of is not left out: packages, and the files that the metadata name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]}

    assert {f"!{name}" for name in (*needed, "pyproject.toml", *project["project"]["license-files"])} <= set(
        (ROOT / ".dockerignore").read_text().splitlines()
    )


@pytest.mark.parametrize("tensorrt", ["10", "11"])
def test_the_extras_exist(tensorrt: str):
    """For both releases of TensorRT; its default is one of them."""
    (install,) = (step.split() for step in arguments("RUN") if "install.sh " in step and "apt" not in step)
    extras = install[install.index("/build") + 1].replace("${TENSORRT}", tensorrt).split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert extras == [f"tensorrt{tensorrt}", "pycuda", "cuda"]
    assert set(extras) <= set(project["optional-dependencies"])
    assert all(f"=={tensorrt}." in pin for pin in project["optional-dependencies"][extras[0]] if "tensorrt" in pin)
    assert defaults()["TENSORRT"] in ("10", "11")
    assert arguments("ENTRYPOINT") == ['["trt-int8"]']
    assert "trt-int8" in project["scripts"]


def test_the_image_runs_as_nobody_special_in_a_mounted_folder():
    """A fixed user that is not root, /work for models and runs, and a cache that user may write to."""
    assert arguments("USER") == ["${UID}"]
    assert int(defaults()["UID"]) > 0
    assert arguments("WORKDIR")[-1] == "/work"
    assert arguments("VOLUME") == ["/work"]
    (user,) = (step.split() for step in arguments("RUN") if "add_user.sh" in step)
    folders = user[user.index("${UID}") + 1 :]
    environment = dict(pair.split("=", 1) for pair in arguments("ENV")[0].split())
    caches = [environment[name] for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")]

    assert "/work" in folders
    assert all(any(cache == folder or cache.startswith(f"{folder}/") for folder in folders) for cache in caches)


def test_both_stages_are_of_one_system():
    """pycuda meets the Python and the C library that it was compiled for; the toolkit is in the first stage alone."""
    first, second = arguments("FROM")

    assert first == "nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS pycuda"
    assert second == "ubuntu:${UBUNTU}"
    assert [mount for mount in mounts() if mount.get("from") == "pycuda"]
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^pycuda==\S+$", pins, flags=re.MULTILINE)


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_reserves_a_gpu():
    """One service with a GPU of NVIDIA's."""
    (service,) = compose()["services"].values()

    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    ]


def test_compose_builds_the_image_and_mounts_the_users_folder():
    """Paths count from the compose file; build arguments are those of the Dockerfile; volumes are declared."""
    service = compose()["services"]["trt-int8"]
    build = service["build"]
    context = (DOCKER / build["context"]).resolve()
    mounted = dict(volume.rsplit(":", 1)[::-1] for volume in service["volumes"])

    assert context == ROOT
    assert (context / build["dockerfile"]).exists()
    assert build["args"].keys() <= {argument.split("=")[0] for argument in arguments("ARG")}
    assert service["image"].endswith("${TENSORRT:-" + defaults()["TENSORRT"] + "}")
    assert mounted == {"/work": "${WORK:-..}", "/var/cache/trt-int8": "cache"}
    assert service["user"] == "${RUN_AS:-" + f"{defaults()['UID']}:{defaults()['UID']}" + "}"
    assert "cache" in compose()["volumes"]


def test_install(tmp_path: Path):
    """The project's wheel, installed into a virtual environment of its own, starts; the last step shows its version."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": sysconfig.get_path("purelib"),  # the dependencies are gigabytes: those of this environment
    }
    done = run("install.sh", tmp_path / "venv", wheel, "tensorrt10,cuda", "--no-index", "--no-deps", **environment)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[-1] == trt_int8.__version__
    (installed,) = (tmp_path / "venv").glob("lib/python*/site-packages/trt_int8")
    assert (installed / "templates").is_dir()


def test_install_stops_where_pip_does(tmp_path: Path):
    """A project that is not there is pip's error, and the status is its own."""
    done = run("install.sh", tmp_path / "venv", tmp_path / "none.whl", "cuda", "--no-index", "--no-deps")

    assert done.returncode != 0
    assert "none.whl" in done.stderr


def test_apt_install(tmp_path: Path):
    """The lists are fetched first; nothing is asked, and nothing more installed than was named."""
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho "${DEBIAN_FRONTEND-} $*"\n')
    apt.chmod(0o755)
    done = run("apt_install.sh", "g++", "python3-venv", PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    update, install = done.stdout.splitlines()

    assert update.endswith(" update")
    assert install == "noninteractive install --yes --no-install-recommends g++ python3-venv"


def test_add_user(tmp_path: Path):
    """A number that somebody has is kept; folders are made, and open to whoever the container is started as."""
    folders = [tmp_path / "work", tmp_path / "var" / "cache"]
    done = run("add_user.sh", os.getuid(), *folders)

    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert folder.stat().st_uid == os.getuid()
        assert folder.stat().st_mode & 0o777 == 0o777


def test_add_user_makes_one_where_nobody_has_the_number(tmp_path: Path):
    """Without a home folder: what the container keeps lies in its cache folder."""
    for name, script in {"getent": "exit 2", "useradd": 'echo "$*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    search = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run("add_user.sh", os.getuid(), tmp_path / "work", PATH=search)

    assert done.stdout == f"--uid {os.getuid()} --no-create-home --shell /usr/sbin/nologin trt-int8\n"
    assert (tmp_path / "work").is_dir()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_refuse_missing_arguments(script: Path):
    """One line of their own, and no half of the work."""
    done = run(script.name)

    assert done.returncode != 0
    assert script.name in done.stderr


def test_pycuda_is_not_compiled_without_cuda(tmp_path: Path):
    """A folder without the headers is named before anything is fetched, and so is a misspelt option."""
    options = ("--constraints", ROOT / "constraints.txt", "--output", tmp_path / "wheels")
    done = run("build_pycuda.sh", *options, "--cuda", tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"build_pycuda.sh: error: there is no {tmp_path}/include/cuda.h\n"

    done = run("build_pycuda.sh", *options, "--cuda-root", tmp_path)
    assert done.returncode == 2
    assert "--cuda-root" in done.stderr
    assert not (tmp_path / "wheels").exists()

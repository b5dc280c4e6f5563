"""The image: its lock files and Dockerfile and, in tests marked `image`, its behaviour on a real engine."""

import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline import __version__
from pipeline.manifest import read_manifest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {name: ROOT / f"docker/requirements-{name}.txt" for name in ("build", "cpu", "cuda", "pillow")}
DOCKERFILE = ROOT / "docker/Dockerfile"
CI_LOCK = ROOT / ".ci/requirements.txt"

# The restrictions of a strict orchestrator.
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
PUBLISHED = ("--publish", "127.0.0.1::9410")
# A small net that logs every step, for more epochs than any test waits.
SMALL = [
    part
    for setting in ("RECIPE=demo", "CROP=67", "BATCH=12", "EPOCHS=10000", "LOG_EVERY=1")
    for part in ("--env", f"ALEXNET_{setting}")
]
PROCESS = "$(cat /proc/1/task/1/children)"  # the trainer, as tini's only child


def locked(name: str) -> dict[str, str]:
    """Return the packages and versions of a lock file; fails if one is not pinned or has no hash."""
    text = re.sub(r"^ *#.*\n", "", LOCKS[name].read_text(), flags=re.MULTILINE)
    versions = {}
    for line in text.replace("\\\n", "").split("\n"):
        if not line:
            continue
        pinned = re.fullmatch(
            r"([\w.-]+)==(\S+)(?: ; platform_machine .= 'x86_64')?((?: +--hash=sha256:[0-9a-f]{64})+) *", line
        )
        assert pinned, f"{name}: {line}"
        versions[canonicalize_name(pinned[1])] = pinned[2]
    return versions


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_file_covers_the_projects_dependencies(name):
    versions = locked(name)
    assert not versions.keys() & locked("pillow").keys()
    versions |= locked("pillow")
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["s3"], *extras["tensorboard"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_the_lock_files_agree():
    build, cpu, cuda, pillow = (locked(name) for name in LOCKS)
    assert cpu.pop("torch").partition("+")[0] == cuda["torch"]
    assert cpu.items() <= cuda.items()
    assert build["setuptools"] == cuda["setuptools"]
    assert pillow.pop("pillow-simd").partition(".post")[0] == pillow["pillow"]
    tested = dict(re.findall(r"^([\w.-]+)==([^ \n]+)", CI_LOCK.read_text(), re.MULTILINE))
    del cuda["triton"]  # which torch's CPU build, of which tests are run, does not ask for
    assert cuda.items() | pillow.items() <= tested.items()


def test_the_versions_of_make_setup_satisfy_every_extra():
    """`make lock` chooses them anew if this fails."""
    locked = re.findall(r"^([\w.-]+)==([^ \n]+)", CI_LOCK.read_text(), re.MULTILINE)
    assert "--hash" not in CI_LOCK.read_text()  # with hashes, pip refuses editable installations
    texts = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    for requirement in map(Requirement, texts):
        versions = [version for name, version in locked if name == canonicalize_name(requirement.name)]
        # torch's CUDA build says which triton; its CPU build takes any.
        if requirement.name not in (PROJECT["name"], "triton"):
            assert versions, f"{requirement} is not locked: run make lock"
        assert all(map(requirement.specifier.contains, versions)), f"{requirement}: run make lock"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_images_are_built_for_both_architectures_without_flags_for_one(target):
    command = [Path(sys.executable).with_name("docker-compose"), "-f", ROOT / "docker/compose.images.yaml"]
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        env=os.environ | {"REGISTRY": "r/", "VERSION": "1.2.3", "REVISION": "abc"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    service = json.loads(done.stdout)["services"][target]
    build = service["build"]
    assert (service["image"], build["tags"]) == (
        f"r/alexnet-train:1.2.3-{target}",
        [f"r/alexnet-train:{target}"],
    )
    assert sorted(build["platforms"]) == ["linux/amd64", "linux/arm64"]
    declared = re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert build["args"].items() >= {"TARGET": target, "VERSION": "1.2.3", "REVISION": "abc"}.items()
    assert build["args"].keys() <= set(declared)
    assert "CPU_FLAGS" not in build["args"]
    assert ROOT / build["context"] == ROOT
    assert build["dockerfile"] == "docker/Dockerfile"


def test_the_dockerfile_has_no_flags_for_one_architecture():
    assert not re.search(
        r"-m(avx|sse|arch|tune|cpu)\S* ", re.sub("^#.*", "", DOCKERFILE.read_text(), flags=re.M)
    )
    assert 'CC="gcc $CPU_FLAGS"' in DOCKERFILE.read_text()


def test_hadolint_finds_nothing_in_the_dockerfile():
    command = [Path(sys.executable).with_name("hadolint"), DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.image
def test_without_a_dataset_the_container_exits_and_says_what_to_mount(docker, image):
    done = docker("run", "--rm", image, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert ":/data:ro" in line
    assert "docker run alexnet-train demo" in line


@pytest.mark.image
def test_the_image_has_the_projects_labels_and_a_user_other_than_root(docker, image):
    def inspect(what: str) -> str:
        return docker("image", "inspect", "--format", f"{{{{{what}}}}}", image).stdout.strip()

    expected = {
        "title": PROJECT["name"],
        "description": PROJECT["description"],
        "licenses": PROJECT["license"],
        "version": __version__,
    }
    for label, value in expected.items():
        assert inspect(f'index .Config.Labels "org.opencontainers.image.{label}"') == value
    assert int(inspect(".Config.User")) > 0


@pytest.mark.image
def test_the_image_has_pillow_simd_and_a_compiler_only_for_cuda(docker, image):
    script = "import PIL, shutil, torch; print(PIL.__version__, shutil.which('gcc'), torch.version.cuda)"
    done = docker("run", "--rm", "--entrypoint", "python", image, "-c", script)
    pillow, compiler, cuda = done.stdout.split()
    assert ".post" in pillow
    assert (compiler == "None") == (cuda == "None")


@pytest.mark.image
@pytest.mark.parametrize("kernel", ["model.cpu_pool", "pipeline.cpu_crop"])
def test_the_image_has_the_kernels_for_cpus(docker, image, kernel):
    docker("run", "--rm", "--entrypoint", "python", image, "-c", f"import alexnet_train.{kernel}")


@pytest.fixture(scope="module")
def data(packed):
    """The packed pictures, mounted read-only at /data; only their owner can read pytest's folders."""
    packed.chmod(0o755)
    return "--volume", f"{packed}:/data:ro"


@pytest.mark.image
def test_a_stop_saves_and_the_next_start_resumes_as_any_user(image, data, start):
    options = (*HARDENED, *PUBLISHED, *SMALL, "--user", "4321:4321", *data)

    first = start(*options, "--volume", "/runs", image)
    first.wait_for_images()
    assert first.sh(f"stat -c %u /proc/{PROCESS}").stdout.strip() == "4321"
    assert first.stop() == 143
    saved = re.search(r"^SIGTERM: saved after step (\d+)", first.logs(), re.MULTILINE)
    assert saved, first.logs()

    second = start(*options, "--volumes-from", first.id, image)
    second.wait_for_images()
    assert f"continuing runs/demo after step {saved[1]}," in second.logs()
    assert second.metric("alexnet_step") > int(saved[1])
    assert second.stop() == 143


@pytest.mark.image
def test_a_stop_during_start_up_ends_the_container(image, data, start):
    container = start(*SMALL, *data, image)
    assert container.stop() == 143
    assert "saved" not in container.logs()


@pytest.mark.image
def test_make_shards_packs_a_mounted_folder(docker, image, pictures, tmp_path):
    pictures.chmod(0o755)
    tmp_path.chmod(0o777)
    mounts = ("--volume", f"{pictures}:/pictures:ro", "--volume", f"{tmp_path}:/packed")
    command = ("make-shards", "--input", "/pictures", "--out", "/packed/shards", "--size", "80")
    docker("run", "--rm", *HARDENED, *mounts, image, *command)
    manifest = read_manifest(tmp_path / "shards")
    assert {split: manifest.split(split).samples for split in ("train", "val")} == {"train": 60, "val": 20}


# Writes a picture in each format to one class, and as TIFF in each compression and in CIELAB to another.
EACH_FORMAT = """
import sys
from pathlib import Path
from PIL import Image
from alexnet_train.pipeline.packing.images import FORMATS
picture = Image.radial_gradient("L").convert("RGB")
TIFF = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg", "zstd", "webp", "lzma")
for split in ("train", "val"):
    formats, tiff = (Path(sys.argv[1], split, name) for name in ("formats", "tiff"))
    formats.mkdir(parents=True)
    tiff.mkdir()
    for name in FORMATS:
        picture.save(formats / name, name)
    picture.save(formats / "lossless", "WEBP", lossless=True)
    picture.convert("CMYK").save(formats / "cmyk", "JPEG")
    picture.convert("LAB").save(tiff / "lab", "TIFF")
    for name in TIFF:
        picture.save(tiff / name, "TIFF", compression=name)
    for name in ("group3", "group4", "tiff_ccitt"):
        picture.convert("1").save(tiff / name, "TIFF", compression=name)
    print(len([*formats.iterdir(), *tiff.iterdir()]))
"""


@pytest.mark.image
def test_it_packs_each_format(docker, image, tmp_path):
    tmp_path.chmod(0o777)
    mount = ("--volume", f"{tmp_path}:/mixed")
    made = docker("run", "--rm", *mount, "--entrypoint", "python", image, "-c", EACH_FORMAT, "/mixed/in")
    command = ("make-shards", "--input", "/mixed/in", "--out", "/mixed/out", "--size", "80")
    docker("run", "--rm", *HARDENED, *mount, image, *command)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.rejected == {}
    assert [manifest.split(split).samples for split in ("train", "val")] == [*map(int, made.stdout.split())]
    assert manifest.split("train").samples == 22


@pytest.fixture(scope="module")
def demo(image, start):
    """The demo, which trains endlessly and can write only to a volume."""
    health = ("--health-interval", "1s", "--health-timeout", "2s", "--health-retries", "1")
    container = start(*HARDENED, *PUBLISHED, *SMALL, *health, "--volume", "/runs", image, "demo")
    container.wait_for_images()
    return container


@pytest.mark.image
def test_the_published_counter_of_images_grows(demo):
    demo.wait_for_images(more_than=demo.wait_for_images())


@pytest.mark.image
def test_the_run_records_the_commit_of_the_image(docker, demo, image):
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    revision = docker("image", "inspect", "--format", label, image).stdout.strip()
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", revision)
    assert demo.sh(f'grep "\\"commit\\": \\"{revision}\\"" /runs/demo/run/environment.json').returncode == 0


@pytest.mark.image
def test_no_process_runs_as_root(docker, demo):
    users = docker("top", demo.id, "-eo", "uid,pid,args").stdout.splitlines()[1:]
    assert any("alexnet_train" in user for user in users)
    assert all(int(user.split()[0]) > 0 for user in users)


@pytest.mark.image
def test_the_root_file_system_is_read_only_even_for_root(demo):
    refused = demo.sh("echo > /venv/written", user="0")
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stderr


@pytest.mark.image
def test_the_container_is_healthy_unless_the_trainer_hangs(demo):
    demo.wait_until(lambda: demo.health() == "healthy")
    assert demo.sh(f"kill -STOP {PROCESS}").returncode == 0
    demo.wait_until(lambda: demo.health() == "unhealthy")
    assert demo.sh(f"kill -CONT {PROCESS}").returncode == 0
    demo.wait_until(lambda: demo.health() == "healthy")

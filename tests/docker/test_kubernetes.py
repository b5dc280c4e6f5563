"""The manifests agree with the schemas of Kubernetes and its operators, with settings, image and each other.

Nothing is scheduled, as tests have no cluster; tests/trainer tests that a run resumes.
"""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml

from model.alexnet import AlexNet
from trainer.setting_sources import load_settings
from trainer.settings import Settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "docker/kubernetes"
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    return [
        document
        for path in sorted(MANIFESTS.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def one(kind: str, name: str) -> Manifest:
    (found,) = (each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


ONE_GPU, MULTI_NODE = one("Job", "imagenet-1gpu"), one("Job", "imagenet-16gpu")
BUCKET, TRAIN_JOB = one("Job", "imagenet-bucket"), one("TrainJob", "imagenet-trainjob")
SERVICE, POD_MONITOR = one("Service", "imagenet-16gpu"), one("PodMonitor", "alexnet-train")
jobs = pytest.mark.parametrize("job", [ONE_GPU, MULTI_NODE, BUCKET], ids=lambda job: job["metadata"]["name"])


def pod(job: Manifest) -> Manifest:
    return job["spec"]["template"]["spec"]


def trainer(job: Manifest) -> Manifest:
    (container,) = pod(job)["containers"]
    return container


def torchrun(container: Manifest | None = None) -> dict[str, str]:
    """Return torchrun's options in a container, by default that of the Job with several nodes."""
    words = shlex.split((container or trainer(MULTI_NODE))["args"][0])
    flags = words[words.index("torchrun") + 1 : words.index("-m")]
    return dict(zip(flags[::2], flags[1::2], strict=True))


def settings(job: Manifest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings that result from a Job's arguments and environment, and the image's."""
    monkeypatch.setenv("ALEXNET_DATA", re.search(r"\bALEXNET_DATA=(\S+)", DOCKERFILE)[1])
    for variable in trainer(job).get("env", []):
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
        else:
            section, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
            monkeypatch.setenv(variable["name"], str(trainer(job)["resources"][section][resource]))
    words = [word for argument in trainer(job)["args"] for word in shlex.split(argument)]
    return load_settings(words[words.index("alexnet_train") + 1 :] if "alexnet_train" in words else words)


def labels(job: Manifest) -> dict[str, str]:
    """Return the labels of a Job's pods, including the one that Kubernetes adds."""
    return job["spec"]["template"]["metadata"]["labels"] | {
        "batch.kubernetes.io/job-name": job["metadata"]["name"]
    }


def checkpoint_bytes() -> int:
    """Return the size of weights and momentum for ImageNet's thousand classes."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AlexNet(1000).parameters())
    return 2 * 4 * parameters


def complaint(manifest: Manifest) -> str:
    """Return what Kubernetes, or the operator for its own kind, finds wrong with a manifest."""
    if manifest["kind"] in ("PodMonitor", "TrainJob"):  # whose models import much, so only if needed
        if manifest["kind"] == "PodMonitor":
            from cloudcoil.models.prometheus_operator.v1 import PodMonitor

            known = PodMonitor.model_validate(manifest)
            again = known.model_dump(mode="json", by_alias=True, exclude_unset=True)
        else:
            from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

            again = TrainerV1alpha1TrainJob.from_dict(manifest).to_dict()
        return "" if again == manifest else f"only this is known of it: {again}"
    try:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda each: f"{each['kind']} {each['metadata']['name']}"
)
def test_manifests_are_valid_and_misspelled_fields_are_detected(manifest):
    assert complaint(manifest) == ""
    misspelled = copy.deepcopy(manifest)
    misspelled["spec"]["selectors"] = {}
    assert "selectors" in complaint(misspelled) or "only this" in complaint(misspelled)


@jobs
def test_settings_fit_the_volumes_and_the_run_is_named_after_the_job(job, monkeypatch):
    got = settings(job, monkeypatch)
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]
        for volume in pod(job)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    places = {mount["mountPath"]: claims.get(mount["name"]) for mount in trainer(job)["volumeMounts"]}
    if job is BUCKET:
        storage = one("PersistentVolumeClaim", "alexnet-cache")["spec"]["resources"]["requests"]["storage"]
        assert places[str(got.cache)] == {"claimName": "alexnet-cache"}
        assert got.cache_size < int(storage.removesuffix("Gi")) << 30
    else:
        assert places[str(got.data)]["readOnly"]
    assert "readOnly" not in places[str(got.run_folder.parent)]
    assert got.run_folder.name == job["metadata"]["name"]
    for claim in claims.values():
        assert one("PersistentVolumeClaim", claim["claimName"])


@jobs
def test_every_process_has_a_gpu_a_share_of_the_batch_and_a_scraped_port(job, monkeypatch):
    got = settings(job, monkeypatch)
    processes, nodes = 1, 1
    if job is MULTI_NODE:
        processes, nodes = int(torchrun()["--nproc-per-node"]), int(torchrun()["--nnodes"])
    assert trainer(job)["resources"]["limits"]["nvidia.com/gpu"] == processes
    assert got.batch % (processes * nodes) == 0
    ports = trainer(job)["ports"]
    assert [port["containerPort"] for port in ports] == [got.port + rank for rank in range(processes)]
    assert got.port == int(re.search(r"EXPOSE (\d+)", DOCKERFILE)[1])
    scraped = {endpoint["port"] for endpoint in POD_MONITOR["spec"]["podMetricsEndpoints"]}
    assert {port["name"] for port in ports} <= scraped


def test_credentials_of_the_bucket_come_from_a_secret_that_may_be_missing():
    assert trainer(BUCKET)["envFrom"] == [{"secretRef": {"name": "alexnet-bucket", "optional": True}}]
    assert "alexnet-bucket --from-literal AWS_ACCESS_KEY_ID" in (MANIFESTS / "bucket.yaml").read_text()


def test_a_job_with_a_bucket_differs_from_the_other_only_in_its_data():
    """What else is needed on one GPU is explained and tested there."""
    pair = [copy.deepcopy(job) for job in (ONE_GPU, BUCKET)]
    for job in pair:
        name = job["metadata"].pop("name")
        container, volumes = trainer(job), {"data", "cache"}
        container["args"] = container["args"][: container["args"].index(f"/runs/{name}")]
        container.pop("envFrom", None)
        for holder, key in ((container, "volumeMounts"), (pod(job), "volumes")):
            holder[key] = [each for each in holder[key] if each["name"] not in volumes]
    assert pair[0] == pair[1]


def test_probes_allow_ten_minutes_for_the_first_process_to_open_its_port():
    startup, liveness = (trainer(ONE_GPU)[f"{name}Probe"] for name in ("startup", "liveness"))
    for probe in (startup, liveness):
        assert probe["httpGet"] == {"path": "/healthz", "port": trainer(ONE_GPU)["ports"][0]["name"]}
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


@jobs
def test_there_is_time_for_two_checkpoints_at_ten_megabytes_a_second(job):
    save_seconds = checkpoint_bytes() / 10e6
    stated = f"{checkpoint_bytes() / 1e6:.0f} MB, which takes {save_seconds:.0f} s at 10 MB/s"
    assert stated in (MANIFESTS / "one-gpu.yaml").read_text()
    assert pod(job)["terminationGracePeriodSeconds"] > 2 * save_seconds
    if job is MULTI_NODE:
        patience = int(torchrun()["--shutdown-timeout"])
        assert 2 * save_seconds < patience < pod(job)["terminationGracePeriodSeconds"]


def test_a_graceful_stop_is_not_a_failure_and_a_refused_setting_is_final():
    rules = ONE_GPU["spec"]["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule} == {
        128 + 15: "Ignore",  # SIGTERM
        2: "FailJob",
    }


@jobs
def test_an_eviction_is_not_a_failure(job):
    first = job["spec"]["podFailurePolicy"]["rules"][0]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod(job)["restartPolicy"] == "Never"


@jobs
def test_a_pod_meets_the_restricted_standard_as_the_images_user_on_a_read_only_root(job):
    of_pod, of_container = pod(job)["securityContext"], trainer(job)["securityContext"]
    assert of_pod["runAsNonRoot"]
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_pod["runAsUser"] == of_pod["fsGroup"] == int(re.search(r"ARG UID=(\d+)", DOCKERFILE)[1])
    assert of_container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "/tmp" in {mount["mountPath"] for mount in trainer(job)["volumeMounts"]}


@jobs
def test_the_selectors_match_the_pods(job):
    selectors = [POD_MONITOR["spec"]["selector"]["matchLabels"]]
    if job is MULTI_NODE:
        selectors.append(SERVICE["spec"]["selector"])
    for selector in selectors:
        assert selector.items() <= labels(job).items()
    assert labels(job)[POD_MONITOR["spec"]["jobLabel"]] == job["metadata"]["name"]


def test_the_nodes_meet_at_the_first_pod_by_its_service_name():
    name, spec, flags = MULTI_NODE["metadata"]["name"], MULTI_NODE["spec"], torchrun()
    assert spec["completionMode"] == "Indexed"
    assert int(flags["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert pod(MULTI_NODE)["subdomain"] == SERVICE["metadata"]["name"]
    assert flags["--rdzv-endpoint"].split(":")[0] == f"{name}-0.{SERVICE['metadata']['name']}"
    assert SERVICE["spec"]["clusterIP"] == "None"


def test_a_trainjob_gives_its_pods_what_the_plain_job_does_except_what_kubeflow_adds():
    """The operator rejects a manager without a domain, and the variables that it sets itself."""
    spec, name = TRAIN_JOB["spec"], TRAIN_JOB["metadata"]["name"]
    (patch,) = spec["runtimePatches"]
    assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/[a-z-]+", patch["manager"])
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = node["template"]["spec"]["template"]["spec"]
    (container,) = patched.pop("containers")
    assert node["name"] == container.pop("name") == "node"  # as in the runtime torch-distributed
    plain = trainer(MULTI_NODE)
    assert patched == {key: pod(MULTI_NODE)[key] for key in patched}
    assert patched.keys() >= {"volumes", "securityContext", "terminationGracePeriodSeconds"}
    assert container == {key: plain[key] for key in ("securityContext", "volumeMounts")}
    given = spec["trainer"]
    assert given["resourcesPerNode"] == plain["resources"]
    assert {key: given[key] for key in ("image", "command", "env")} == {
        key: plain[key] for key in ("image", "command", "env")
    }
    flags = torchrun()
    assert str(given["numNodes"]) == flags.pop("--nnodes")
    assert str(given["numProcPerNode"]) == flags.pop("--nproc-per-node")
    flags |= {"--rdzv-id": name, "--rdzv-endpoint": "$PET_MASTER_ADDR:$PET_MASTER_PORT"}
    flags["--rdzv-conf"] = flags["--rdzv-conf"].replace("JOB_COMPLETION_INDEX", "PET_NODE_RANK")
    assert torchrun(given) == flags
    settings_of = [container["args"][0].partition("-m alexnet_train")[2] for container in (given, plain)]
    assert settings_of[1]
    assert settings_of[0] == settings_of[1].replace(MULTI_NODE["metadata"]["name"], name)

"""Several processes of one command: restarts, ends and messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ranks_of, wait_until
from trainer.processes import distributed, launch
from trainer.processes.watchdog import EXIT_STALLED
from trainer.settings import Settings, SettingsError

# Each stand-in process begins with this code, which adds a line to the file `starts`.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from trainer.processes.launch import report_error
signal.alarm(180)  # end if the expected event never happens
rank, starts = int(os.environ["RANK"]), Path(sys.argv[1])
with starts.open("a") as file:
    file.write(f"{rank} {os.getpid()}\\n")
def until_there(lines):
    while len(starts.read_text().splitlines()) < lines:
        time.sleep(0.01)
"""


def stand_in(tmp_path: Path, code: str) -> list[str]:
    return [sys.executable, "-c", PRELUDE + code, str(tmp_path / "starts")]


def started(tmp_path: Path) -> list[str]:
    return sorted(line[0] for line in (tmp_path / "starts").read_text().splitlines())


def test_each_process_gets_its_rank(tmp_path):
    code = """
world = [os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")]
Path(f"{starts}-{rank}").write_text(" ".join(world))
"""
    assert launch.launch(stand_in(tmp_path, code), 2, 0) == 0
    worlds = [(tmp_path / f"starts-{rank}").read_text().split() for rank in (0, 1)]
    assert [world[:3] for world in worlds] == [["2", "0", "2"], ["2", "1", "2"]]
    assert worlds[0][3] == worlds[1][3]


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({EXIT_STALLED})"])
def test_all_are_restarted_when_one_is_lost(tmp_path, capfd, end):
    code = f"""
if [line[0] for line in starts.read_text().splitlines()].count(str(rank)) == 1:
    until_there(2)
    if rank == 1:
        {end}
    time.sleep(60)
"""
    assert launch.launch(stand_in(tmp_path, code), 2, 3) == 0
    assert started(tmp_path) == ["0", "0", "1", "1"]
    error = capfd.readouterr().err
    assert error.count("restarting all processes from the last checkpoint, restart 1 of 3") == 1
    assert "Traceback" not in error


def test_the_number_of_restarts_is_limited(tmp_path, capfd):
    assert launch.launch(stand_in(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), 1, 2) == 137
    assert started(tmp_path) == ["0"] * 3
    assert capfd.readouterr().err.endswith("run the same command again to continue\n")


def test_an_error_of_all_processes_is_printed_once_and_not_retried(tmp_path, capfd):
    code = 'until_there(2); report_error("alexnet-train: no such thing", 2); sys.exit(2)'
    assert launch.launch(stand_in(tmp_path, code), 2, 3) == 2
    assert started(tmp_path) == ["0", "1"]
    assert capfd.readouterr().err == "alexnet-train: no such thing\n"


def test_the_exit_code_is_that_of_the_process_that_explains_the_failure(tmp_path, capfd):
    code = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
until_there(2)
if rank == 0:
    report_error("alexnet-train: another is gone", {EXIT_STALLED})
    sys.exit({EXIT_STALLED})
time.sleep(1)
report_error("alexnet-train: the data are gone", 1)
sys.exit(1)
"""
    assert launch.launch(stand_in(tmp_path, code), 2, 3) == 1
    assert started(tmp_path) == ["0", "1"]
    assert capfd.readouterr().err == "alexnet-train: the data are gone\n"


def test_a_process_that_does_not_end_with_the_others_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); until_there(2); rank or time.sleep(600); sys.exit(2)"
    )
    assert launch.launch(stand_in(tmp_path, code), 2, 3) == 2


def test_a_signal_reaches_each_process_once(tmp_path):
    code = """
caught = []
signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
Path(f"{starts}-{rank}").touch()
if rank == 0:
    while not Path(f"{starts}-1").exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
while not caught:
    time.sleep(0.01)
time.sleep(1)
sys.exit(143 if len(caught) == 1 else 1)
"""
    assert launch.launch(stand_in(tmp_path, code), 2, 3) == 143
    assert started(tmp_path) == ["0", "1"]


def test_no_process_outlives_the_command(tmp_path):
    starts = tmp_path / "starts"
    code = (
        f"from trainer.processes.launch import launch; launch({stand_in(tmp_path, 'time.sleep(600)')}, 2, 3)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: starts.exists() and len(starts.read_text().splitlines()) == 2, process)
    pids = ranks_of(process.pid).values()
    process.kill()
    process.wait()
    assert len(pids) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize(
    ("gpus", "device", "processes", "size"),
    [
        (0, "auto", None, 1),
        (0, "auto", 3, 3),
        (4, "auto", None, 4),
        (4, "cuda", 2, 2),
        (4, "cuda:1", None, 1),
        (4, "cpu", None, 1),
        (4, "cpu", 8, 8),
    ],
)
def test_a_machine_gets_a_process_for_each_gpu(monkeypatch, gpus, device, processes, size):
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    assert launch.world_size(Settings(device=device, processes=processes)) == size


@pytest.mark.parametrize(("device", "processes"), [("auto", 5), ("cuda:1", 2)])
def test_more_processes_than_gpus_are_refused(monkeypatch, device, processes):
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    with pytest.raises(SettingsError, match=f"--processes {processes}: each process needs a GPU"):
        launch.world_size(Settings(device=device, processes=processes))


@pytest.mark.parametrize(
    ("port", "processes", "fits"), [(65535, 1, True), (65534, 2, True), (65535, 2, False)]
)
def test_each_process_needs_a_port(port, processes, fits):
    settings = Settings(device="cpu", port=port, processes=processes)
    if fits:
        assert launch.world_size(settings) == processes
    else:
        with pytest.raises(SettingsError, match=r"--port 65535: 2 processes .* use --port 65534 or less"):
            launch.world_size(settings)


def test_an_error_with_any_characters_reaches_the_launcher(tmp_path, capfd):
    code = """
import errno
from trainer.processes.launch import report_error
report_error("of a folder caf\\udce9\\nwith two lines", 2)
sys.exit(2)
"""
    assert launch.launch(stand_in(tmp_path, code), 2, 0) == 2
    assert capfd.readouterr().err.count("with two lines") == 1


def test_the_number_of_torchruns_processes_is_not_changed(monkeypatch):
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    given = {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8, "RANK": 9, "LOCAL_RANK": 1}
    for name, value in (given | {"MASTER_ADDR": "host", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))
    assert launch.world_size(Settings()) == 16
    with pytest.raises(SettingsError, match="--processes 2: torchrun has started 8 here"):
        launch.world_size(Settings(processes=2))
    with pytest.raises(SettingsError, match="--device cuda:0: torchrun has started 8 here"):
        launch.world_size(Settings(device="cuda:0"))


def test_a_process_of_a_group_ends_without_waiting_for_the_others():
    """What runs at a normal end stands for NCCL, which then waits for the other processes."""
    code = """
import atexit, os, signal, sys
import torch
from trainer.processes.launch import end_process
atexit.register(os.kill, os.getpid(), signal.SIGKILL)
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
print("said")
end_process(1)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "said\n")


def test_gpus_that_torch_cannot_use_are_not_replaced_by_processes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(distributed, "count_gpus", lambda: 2)
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="the driver has 2 GPUs, but torch cannot use them"):
        distributed.join("auto")

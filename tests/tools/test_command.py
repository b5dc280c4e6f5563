"""The entry point `alexnet-train`: which command runs, what is refused, and help for each."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import __version__
from tests.helpers import REPO
from tools import command

SCRIPTS = {name: each.module for name, each in command.COMMANDS.items() if each.module != command.TRAINER}
HEAVY = ("torch", "nvidia.dali", "webdataset", "matplotlib", "onnxruntime")


@pytest.fixture
def alexnet_train(monkeypatch, capsys):
    """alexnet_train(*arguments): run the command in this process; returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/alexnet-train", *arguments])
        code: object = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, list[str]]]:
    """The modules that were started, each with its sys.argv; nothing really runs."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        command,
        "import_module",
        lambda module: SimpleNamespace(main=lambda: found.append((module, list(sys.argv)))),
    )
    return found


@pytest.mark.parametrize("arguments", [[], ["--data", "shards"], ["--data", "shards", "--help"]])
def test_without_a_command_it_trains(arguments, alexnet_train, started):
    assert alexnet_train(*arguments)[0] == 0
    assert started == [("trainer.cli", ["/somewhere/bin/alexnet-train", *arguments])]


@pytest.mark.parametrize("name", ["train", "evaluate", "demo"])
def test_commands_of_the_trainer_are_passed_on_unchanged(name, alexnet_train, started):
    alexnet_train(name, "--data", "shards")
    assert started == [("trainer.cli", ["/somewhere/bin/alexnet-train", name, "--data", "shards"])]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_other_command_starts_its_module_under_its_own_name(name, alexnet_train, started):
    alexnet_train(name, "--seed", "1")
    assert started == [(SCRIPTS[name], [f"alexnet-train {name}", "--seed", "1"])]


def test_help_lists_every_command_and_says_where_the_settings_are(alexnet_train):
    code, out, errors = alexnet_train("--help")
    assert (code, errors) == (0, "")
    assert alexnet_train("-h")[1] == out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert [word for word in listed if not word.startswith("-")] == list(command.COMMANDS)
    assert "alexnet-train train --help" in out


def test_the_version_is_that_of_the_code(alexnet_train):
    assert alexnet_train("--version") == (0, f"alexnet-train {__version__}\n", "")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("make_shards", "did you mean 'make-shards'?"),
        ("verify", "did you mean 'verify-shards'?"),
        ("xyz", "the commands are train, evaluate, demo, "),
    ],
)
def test_an_unknown_command_is_refused_with_the_nearest_one(wrong, hint, alexnet_train):
    code, out, errors = alexnet_train(wrong, "--help")
    assert (code, out) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"alexnet-train: unknown command '{wrong}'; {hint}")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_every_command_comes_without_heavy_imports(name):
    code = (
        "import sys\n"
        "from tools.command import main\n"
        f"sys.argv = ['alexnet-train', '{name}', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"heavy = set({HEAVY}) & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    expected = "alexnet-train" if name == "train" else f"alexnet-train {name} ["  # train may be left out
    assert done.stdout.startswith(f"usage: {expected}")
    assert "--output" not in done.stdout


@pytest.mark.parametrize("name", ["make-shards", "classify", "paper"])
def test_the_help_of_a_script_shows_the_scripts_name(name):
    script = Path("tools", f"{name.replace('-', '_')}.py")
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {script.name} [")


def test_the_entry_points_are_the_functions_tested_here():
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"alexnet-train": "tools.command:main", "make-shards": "tools.make_shards:main"}


@pytest.mark.parametrize("name", ["bench", "train"])
def test_ctrl_c_ends_any_command_without_a_traceback(name, alexnet_train, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "import_module", lambda _: SimpleNamespace(main=interrupted))
    assert alexnet_train(name) == (130, "", "")

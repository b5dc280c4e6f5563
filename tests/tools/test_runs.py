"""The list of runs: what is found, how it is sorted, and the page in a real browser."""

import os
import re

import pytest

from tests.run_folders import write_run
from tools import runs


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys):
    """listed(*arguments): run the command in tmp_path; returns exit code, lines of output and of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["alexnet-train runs", *arguments])
        with pytest.raises(SystemExit) as stop:
            runs.main()
        out, errors = capsys.readouterr()
        return stop.value.code, out.splitlines(), errors.splitlines()

    return run


@pytest.fixture
def three(tmp_path):
    """Three runs in the folder runs: a finished one, one that stopped early, and one without evaluations."""
    made = [
        write_run(tmp_path / "runs" / "a", [0.5, 0.25, 0.375], is_finished=True, seed=7),
        write_run(tmp_path / "runs" / "deep" / "er" / "b", [0.75, 0.5], is_finished=True, classes=3),
        write_run(tmp_path / "runs" / "c", recipe="small", rates=()),
    ]
    for number, folder in enumerate(made):
        for path in folder.iterdir():
            os.utime(path, (1_000_000 + 60 * number,) * 2)
    return tmp_path / "runs"


def test_the_table_says_what_each_run_has_reached(three, listed):
    code, lines, errors = listed("--sort", "run")
    assert (code, errors) == (0, [])
    columns = [re.split(r"\s{2,}", line) for line in lines]
    assert columns[0][:5] == ["run", "best top-1 error", "last top-1 error", "epochs done", "state"]
    # 10 steps of 24 images at each of 100, 300 and 200 images/s: 2.4 s, 0.8 s and 1.2 s
    assert columns[1][:7] == ["runs/a", "25.00%", "37.50%", "3.00", "finished", "200.0", "4 s"]
    assert columns[1][7:] == ["1970-01-12 13:46", "0.750", "18.75%", "demo", "seed 7"]
    assert columns[2][:5] == ["runs/c", "–", "–", "0.00", "no steps yet"]
    assert columns[3][:5] == ["runs/deep/er/b", "50.00%", "50.00%", "2.00", "stopped early"]
    assert columns[3][9] == "–"  # the top-5 error of three classes


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ([], "cba"),  # last changed first
        (["--reverse"], "abc"),
        (["--sort", "best"], "abc"),
        (["--sort", "best", "--reverse"], "bac"),  # what is not known comes last
        (["--sort", "epoch"], "abc"),
        (["--sort", "state"], "acb"),
    ],
)
def test_runs_are_sorted_by_any_column(three, listed, arguments, order):
    _, lines, _ = listed(*arguments)
    assert "".join(line.split()[0][-1] for line in lines[1:]) == order


def test_a_narrow_terminal_leaves_out_the_last_columns(three, listed, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 20)))
    _, lines, _ = listed()
    assert max(map(len, lines[:4])) <= 60
    assert lines[0].split()[:4] == ["run", "best", "top-1", "error"]
    assert lines[-1].startswith("not shown, for want of width: ")
    assert lines[-1].endswith(", changed settings")


def test_runs_that_cannot_be_read_are_a_line_each_and_the_others_are_listed(three, listed):
    for name, file, content in (
        ("empty-settings", "settings.json", b""),
        ("half-settings", "settings.json", b'{"seed": 1'),
        ("damaged-table", "metrics.csv", b"step,epoch,loss,error,images_per_second\n\0\0\n1,1,1,1,1\n"),
        ("damaged-net", "net.json", b"[]"),
        ("newer", "settings.json", b'{"new_setting": 1}'),
    ):
        (write_run(three / "bad" / name, [0.5]) / file).write_bytes(content)
    (three / "bad" / "killed").mkdir()
    (three / "bad" / "killed" / ".lock").write_text("")
    (three / "bad" / "folder").mkdir()
    half = write_run(three / "half", [0.5])
    with open(half / "evaluations.csv", "ab") as file:
        file.write(b"20,2.0,0.2")  # a row that is being written
    code, lines, errors = listed("runs", "typo", "runs/bad/folder", "--sort", "run")
    assert code == 1
    assert [line.split()[0] for line in lines[1:]] == ["runs/a", "runs/c", "runs/deep/er/b", "runs/half"]
    assert "50.00%" in lines[4]
    assert len(errors) == 8
    for name, problem in {
        "empty-settings": "settings.json is damaged",
        "half-settings": "settings.json is damaged",
        "damaged-table": "metrics.csv is damaged (line 2)",
        "damaged-net": "net.json",
        "newer": "'new_setting', which this version does not know",
        "killed": "stopped before it recorded its settings",
        "typo": "No such file or directory",
        "folder": "no run in runs/bad/folder",
    }.items():
        (line,) = (line for line in errors if name in line and problem in line)
        assert line.startswith("alexnet-train: ")


def test_a_folder_that_is_given_twice_is_listed_once(three, listed):
    code, lines, errors = listed("runs/a", "runs", "runs/a")
    assert (code, len(lines), errors) == (0, 4, [])


def test_a_page_that_cannot_be_written_is_one_line(three, listed):
    code, lines, (error,) = listed("--html", "gone/runs.html")
    assert (code, len(lines)) == (1, 4)
    assert error == "alexnet-train: gone/runs.html: No such file or directory"


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_page_that_is_a_folder_is_refused_in_one_line(three, listed, folder):
    code, lines, (error,) = listed("--html", folder)
    assert (code, len(lines), error) == (1, 4, f"alexnet-train: {folder}: Is a directory")


def test_settings_with_names_that_are_not_utf8_are_shown(tmp_path, listed):
    write_run(tmp_path / "runs" / "a", initial_weights=tmp_path / os.fsdecode(b"\xff"))
    code, _, errors = listed("--html", "runs.html")
    assert (code, errors) == (0, ["alexnet-train: wrote runs.html"])
    assert "\\xff" in (tmp_path / "runs.html").read_text()


def test_names_cannot_control_a_terminal(tmp_path, listed):
    write_run(tmp_path / "runs" / "a\x1b[31m\nb", [0.5])
    _, lines, _ = listed()
    assert len(lines) == 2
    assert lines[1].startswith(r"runs/a\x1b[31m\nb ")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_opens_as_a_file_and_its_columns_can_be_sorted(three, listed, browser, scheme, width):
    write_run(three / """x"><script>alert(1)</script>&amp;'""", [0.3, 0.2])
    code, _, errors = listed("--sort", "best", "--html", "runs.html")
    assert (code, errors) == (0, ["alexnet-train: wrote runs.html"])
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    requests, problems = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: problems.append(dialog.message))
    url = (three.parent / "runs.html").as_uri()
    tab.goto(url)

    def order() -> list[str]:
        return [text.strip().removeprefix("runs/")[:4] for text in tab.locator("tbody th").all_inner_texts()]

    assert order() == ['x"><', "a", "deep", "c"]
    head = tab.get_by_role("columnheader", name="best top\u20111 error")
    assert head.get_attribute("aria-sort") == "ascending"
    tab.get_by_role("button", name="best top\u20111 error").click()
    assert order()[:3] == ["deep", "a", 'x"><']
    assert order()[3] == "c"  # what is not known comes last
    tab.get_by_role("button", name="images/s").click()
    assert tab.get_by_role("columnheader", name="images/s").get_attribute("aria-sort") == "descending"
    tab.get_by_role("button", name="run", exact=True).press("Enter")
    assert order() == ["a", "c", "deep", 'x"><']

    charts = tab.locator(".chart")
    titles = charts.locator("figcaption").all_inner_texts()
    assert titles == ["validation top-1 error", "training loss", "images/s"]
    box = tab.get_by_role("checkbox", name="runs/a", exact=True)
    curve = charts.first.locator(f"polyline[data-run='{box.get_attribute('data-run')}']")
    assert curve.is_visible()
    box.uncheck()
    assert not curve.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert (requests, problems) == ([url], [])

"""How the command behaves where people and scripts use it: pipes, paths, narrow terminals, Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from allot.cli import console
from allot.cli import inspect as verbs
from allot.cli import main as cli
from cli.command import FACTORIES, MLP, SAMPLES, Outcome, done, refused, run


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 60 columns is sent."""

    def at(**settings: object) -> io.StringIO:
        sent = io.StringIO()
        screen = Console(file=sent, force_terminal=True, width=60, **settings)
        for module in (cli, console, verbs):
            monkeypatch.setattr(module, "people", screen)
        return sent

    return at


def started(words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "allot", *words.split()]
    # a background job of a shell ignores Ctrl-C, and so would its children
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)


def test_a_terminal_sees_bars_with_time_left(terminal):
    sent = terminal()
    done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out RUN")
    shown = sent.getvalue()
    for name in ("loading model", "measuring MACs", "sparsity per layer (erk)", "choosing weights", "(variance)"):
        assert name in shown, name
    assert "stage 4 of 4" in shown and "0:00:00" in shown  # and the time left, see tests/report/test_progress.py
    sent = terminal()
    done(f"evaluate RUN --model {MLP} --data {SAMPLES} --json")
    assert "scoring" in sent.getvalue()


def test_every_phase_of_the_finish_is_a_line_with_its_seconds():
    err = done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out RUN").err
    phases = [line.rpartition(": ")[0] for line in err.splitlines() if re.search(r": \d+\.\d s$", line)]
    assert phases == [
        "writing model.safetensors", "writing model.bitmask.safetensors", "re-opening and recounting",
        "writing the report", "opening model.bitmask.safetensors and comparing outputs", "verifying",
    ]  # fmt: skip


def test_a_log_sees_no_bars_and_no_colours():
    words = f"--data {SAMPLES} --budget sparsity=0.5 --out RUN"
    for line in (f"prune {MLP} {words}", f"evaluate RUN --model {MLP} --data {SAMPLES}"):
        err = done(line).err
        assert "\x1b" not in err and "\r" not in err and "━" not in err
    assert "\x1b" not in run("plan zoo:none --budget sparsity=0.5").err


def test_what_models_and_data_print_stays_out_of_the_answer():
    line = "cli.factories:talkative --data cli.factories:talkative_data"
    for words in (f"plan {line} --budget macs=50%", f"prune {line} --budget sparsity=0.5 --repair bias --out RUN"):
        outcome = done(f"{words} --json")
        assert outcome.json["total"] == 160 and "model made" in outcome.err and "forward" in outcome.err
    assert done(f"evaluate RUN --model {line} --json").json["samples"] == 3


def test_a_log_loses_no_figures():
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "allot", *["plan", "zoo:glyph-vit", "--budget", "sparsity=0.9"]]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout == "" and "…" not in shown.stderr and "stem.0.weight" in shown.stderr


def test_errors_are_red_unless_colours_are_unwanted(terminal, monkeypatch):
    sent = terminal()
    run("plan zoo:none --budget sparsity=0.5")
    assert "\x1b[31m" in sent.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    sent = terminal()
    run("plan zoo:none --budget sparsity=0.5")
    assert "\x1b[31m" not in sent.getvalue() and "error: unknown zoo model" in sent.getvalue()


def test_errors_and_paths_stay_on_one_line_in_a_narrow_terminal(terminal):
    name = "a_long_name_" * 8 + "[red]"
    sent = terminal(no_color=True)
    run(f"plan zoo:{name} --budget sparsity=0.5")
    assert sent.getvalue().count("\n") == 1 and name in sent.getvalue()
    sent = terminal(no_color=True)
    done(f"prune {MLP} --budget sparsity=0.5 --repair none --out {name}/{name}")
    assert f"run directory: {name}/{name}\n" in sent.getvalue()
    done(f"report {name}/{name} --json")


def test_long_layer_names_are_whole_in_json_and_harmless_in_tables(terminal):
    name = "a_layer_with_a_name_that_nobody_would_type_twice_" * 3
    line = "plan cli.factories:long_names --budget sparsity=0.5"
    assert done(f"{line} --json").json["layers"][0]["name"] == f"{name}.weight"
    terminal()
    done(line)


@pytest.mark.parametrize("place", ["with space", "größe/файл", "a'b", "[bold]", "./deep/er/../er"])
def test_paths_may_look_like_anything(place):
    quoted = f'"{place}"'
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    made = done(f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --method erk --out {quoted} --json").json
    assert made["run"] == str(Path(place))
    for line in (f"verify {quoted}", f"report {quoted}", f"evaluate {quoted} --model {MLP} --data {SAMPLES}"):
        done(line)
    assert [run["run"] for run in done(f"report {quoted} {quoted} --json").json["runs"]] == [str(Path(place))] * 2
    shutil.copy(Path(place) / "model.safetensors", "my weights.safetensors")
    done(f"plan {MLP} --weights 'my weights.safetensors' --budget sparsity=0.5")
    done(f"plan {MLP} --allocate {quoted} --budget sparsity=0.5")


def test_a_factory_in_a_file_and_a_run_are_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "my nets").mkdir()
    (tmp_path / "my nets" / "sizes.py").write_text("WIDTH = 6\n")
    factory = "from torch import nn\nfrom sizes import WIDTH\n\ndef net():\n    return nn.Linear(WIDTH, 4)\n"
    (tmp_path / "my nets" / "net.py").write_text(factory)
    spec = f"{tmp_path}/my nets/net.py:net"
    done(f"prune '{spec}' --data {SAMPLES} --budget sparsity=0.5 --out {tmp_path}/RUN")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert done(f"evaluate ../RUN --model '{spec}' --data {SAMPLES} --json").json["samples"] == 40
    assert os.listdir() == []


def test_ctrl_c_before_anything_is_written_ends_with_130():
    assert refused("plan cli.factories:interrupted --budget sparsity=0.5", 130) == "error: interrupted.\n"
    assert refused(f"evaluate {MLP} --data cli.factories:interrupted", 130) == "error: interrupted.\n"


def test_ctrl_c_while_the_model_is_made_ends_with_130_and_leaves_nothing():
    process = started(f"prune {FACTORIES}:never_made --budget sparsity=0.5 --repair none --out RUN")
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted.\n")
    assert not Path("RUN").exists()


STOPPED = f"prune {FACTORIES}:slow --data {FACTORIES}:samples --budget sparsity=0.5 --batch-size 8 --repair bias --json"


def repairs(out: str) -> bool:
    """Whether the run in this directory has taken a step of its repair."""
    steps = Path(out, "steps.jsonl")
    return steps.exists() and "repair" in steps.read_text()


def says_how_to_go_on_and_does(ended: Outcome) -> None:
    assert ended.code == 130 and ended.out == ""
    assert (
        ended.err.startswith("stopped in stage repair-1-bias after step ") and "the same command goes on" in ended.err
    )
    for place in ("A", "B"):
        done(f"{STOPPED} --out {place}")
    assert Path("A/model.safetensors").read_bytes() == Path("B/model.safetensors").read_bytes()


def test_a_stopped_run_says_how_to_go_on_and_ends_like_one_that_was_not_stopped():
    process = started(f"{STOPPED} --out A")
    while process.poll() is None and not repairs("A"):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    says_how_to_go_on_and_does(Outcome(process.returncode, out, err))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_so_does_a_run_that_another_signal_stops(number):
    """In this process, which is sent the signal: what a process is sent and what becomes of it is the test above."""
    over = threading.Event()

    def send() -> None:
        while not (over.wait(0.02) or repairs("A")):
            pass
        os.kill(os.getpid(), number)

    late = signal.signal(number, lambda *_: None)  # a run that ends before it would end these tests with it
    sender = threading.Thread(target=send)
    sender.start()
    try:
        ended = run(f"{STOPPED} --out A")
    finally:
        over.set()
        sender.join()
        signal.signal(number, late)
    says_how_to_go_on_and_does(ended)


def test_a_log_is_told_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    line = f"prune {MLP} --data {SAMPLES} --budget sparsity=0.5 --allocate uniform --repair distill --json"
    line += " --set options.distill.steps=4 --out"
    assert "training (distill)" not in done(f"{line} QUIET").err  # it takes no ten seconds
    monkeypatch.setattr(console, "EVERY", 0.0)
    told = done(f"{line} LOUD")
    assert re.search(r"training \(distill\): 3 of 4, loss [\d.e-]+, \d+ s left", told.err) and "3 of 4" not in told.out
    assert told.err.startswith("loading")

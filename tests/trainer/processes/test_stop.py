"""Signals that ask a run to stop."""

import os
import signal

import pytest

from trainer.processes import stop
from trainer.processes.stop import Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(number, monkeypatch):
    class SecondSignalError(Exception):
        pass

    def before(*_: object) -> None:
        raise SecondSignalError

    monkeypatch.setitem(stop.REPEAT_SECONDS, signal.SIGTERM, 0.0)
    own = signal.signal(number, before)
    try:
        with StopRequest() as request:
            assert not request.is_made
            os.kill(os.getpid(), number)
            assert request.is_made
            assert request.signal == number
            with pytest.raises(SecondSignalError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, own)


def test_the_two_sigterms_that_slurm_sends_are_one_request(monkeypatch):
    monkeypatch.setitem(stop.REPEAT_SECONDS, signal.SIGTERM, 600.0)
    with StopRequest() as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM


def test_ctrl_c_and_the_sigterm_that_torchrun_then_sends_are_one_request():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_made


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_that_may_be_repeated_requests_a_stop_unless_it_was_ignored(number, before):
    own = signal.signal(number, before)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), number)
            if before == signal.SIG_DFL:
                assert request.signal == number
                os.kill(os.getpid(), number)  # as the shell does after the terminal
            assert request.is_made == (before == signal.SIG_DFL)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, own)


def test_the_exit_code_is_that_of_a_process_ended_by_the_signal():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    assert [Stopped(number).exit_code for number in numbers] == [143, 130, 129, 138]

"""Ctrl-C sets a flag the first time and raises the second time."""

import os
import signal
import threading

import pytest

from imagemill.terminal.interrupts import Interrupted, Interrupts, signals_blocked
from tests.waiting import PATIENCE


def test_the_first_signal_sets_a_flag_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.asked()
        interrupts.pause(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked()
        interrupts.rest(60)
        with pytest.raises(Interrupted):
            interrupts.pause(60)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_delayed_during_a_write() -> None:
    with Interrupts() as interrupts:
        with signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            assert not interrupts.asked()
        assert interrupts.asked()


def test_a_signal_ends_a_wait() -> None:
    """Whenever it arrives; a handler that took a lock could block here for good."""
    for _ in range(50):
        with Interrupts() as interrupts:
            number = signal.SIGTERM
            thread = threading.Thread(
                target=signal.pthread_kill, args=(threading.main_thread().ident, number)
            )
            thread.start()
            interrupts.rest(PATIENCE)
            thread.join()
            assert interrupts.asked()

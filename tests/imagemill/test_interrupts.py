"""Ctrl-C asks once and insists the second time."""

import os
import signal
import threading

import pytest

from imagemill.terminal.interrupts import Interrupted, Interrupts, unbroken


def test_the_first_is_a_question_and_the_second_an_order() -> None:
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


def test_a_signal_waits_for_a_write() -> None:
    with Interrupts() as interrupts:
        with unbroken():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            assert not interrupts.asked()
        assert interrupts.asked()

"""Ctrl-C reaches the tests and their processes also where a shell ignores it, as in what it runs in the background."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

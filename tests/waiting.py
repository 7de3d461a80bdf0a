"""How tests wait: for a state, never for a time."""

import time

DEADLINE_S = 60
"""Whatever has not happened by then does not happen. No test waits for it to pass."""
PAUSE_S = 0.02
"""Between two looks."""


def until(what, look):
    """Looks again and again; what `look` found, once that is something."""
    end = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(PAUSE_S)
    return found

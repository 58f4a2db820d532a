"""What every attack program uses. Programs run inside a sandbox; those with a control also outside, where they succeed.

An attempt that achieves something prints ESCAPED; one that is refused prints "contained". Only refusals by the system
count as such: any other exception ends the program with an error, and its test fails.
"""

import json
import sys

PARAMETERS = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}


class Refused(Exception):
    """The act had no effect, though no call failed."""


def attempt(what, act):
    try:
        result = act()
    except (OSError, Refused) as error:
        print(f"contained: {what}: {error}", flush=True)
    else:
        print(f"ESCAPED: {what}: {result!r}", flush=True)

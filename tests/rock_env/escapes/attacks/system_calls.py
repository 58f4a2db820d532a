"""Make system calls that lead out of a sandbox or deep into the kernel: {name: [number, arguments]}.

Arguments are such that the call would do something where it is allowed, or fail with another error than EPERM.
"""

import ctypes
import errno

from attack import PARAMETERS, attempt

libc = ctypes.CDLL(None, use_errno=True)


def call(number, arguments):
    converted = [a.encode() if isinstance(a, str) else ctypes.c_long(a) for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        if code != errno.EPERM:
            raise SystemExit(f"expected EPERM, got {errno.errorcode[code]}: the filter did not see it")
        raise OSError(code, "EPERM")
    return result


for name, (number, arguments) in PARAMETERS["calls"].items():
    attempt(name, lambda number=number, arguments=arguments: call(number, arguments))

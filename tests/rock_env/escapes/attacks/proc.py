"""Write the kernel's settings, read its memory, and take over the sandbox's first process through /proc."""

import os

from attack import attempt

for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/proc/1/mem"):
    attempt(f"open {path} for writing", lambda path=path: os.open(path, os.O_RDWR))
for path in ("/proc/kcore", "/proc/kmsg", "/proc/1/mem", "/proc/1/environ", "/dev/mem", "/sys/kernel/security"):
    attempt(f"open {path}", lambda path=path: os.open(path, os.O_RDONLY))

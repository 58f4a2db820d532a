"""Make device nodes and open the host's devices."""

import os
import stat

from attack import attempt

for name, kind, major, minor in (
    ("mem", stat.S_IFCHR, 1, 1),
    ("null", stat.S_IFCHR, 1, 3),
    ("disk", stat.S_IFBLK, 8, 0),
):
    device = os.makedev(major, minor)
    attempt(f"mknod {name}", lambda n=name, k=kind, d=device: os.mknod(f"/tmp/{n}", k | 0o600, d))
for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/loop0", "/dev/fuse", "/dev/kvm"):
    attempt(f"open {path}", lambda path=path: os.open(path, os.O_RDONLY))

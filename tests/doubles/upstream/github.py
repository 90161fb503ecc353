"""What a build takes from GitHub: tt-metal at a tag, with a submodule, and the release files of SFPI and OpenMPI."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.files import sha256_file
from common.hardware import table
from tests import doubles
from tests.doubles import machines
from tests.doubles.upstream import archive
from tests.doubles.upstream.tools import run

AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "stand-in"), ("EMAIL", "stand-in@example.org"), ("DATE", "2026-10-08T00:00:00Z"))
}
UMD = "tt_metal/third_party/umd"
GITMODULES = f'[submodule "umd"]\n\tpath = {UMD}\n\turl = https://github.com/tenstorrent/tt-umd.git\n'
# It refuses what the real one refuses (an option it does not know), and leaves what the real one leaves: `build`, a
# link to build_Release, with the libraries. An ELF file of the base stands for _ttml: it is stripped and found.
BUILD = """\
#!/bin/bash
set -euo pipefail
for word in "$@"; do
    case $word in
    --build-tt-train | --disable-profiler | --disable-warnings-as-errors | --use-system-sfpi | --toolchain-path) ;;
    cmake/*) test -e "$word" ;;
    *) echo "build_metal.sh: unrecognized option '$word'" >&2; exit 1 ;;
    esac
done
test -e {umd}/README.md || {{ echo "build_metal.sh: the submodules are not here" >&2; exit 1; }}
command -v cmake ninja >/dev/null
mkdir -p build_Release/lib
ln -s build_Release build
cp /lib/x86_64-linux-gnu/libm.so.6 build/lib/libtt_metal.so
place="{place}"
[ -z "$place" ] || {{ mkdir -p "$place"; cp /lib/x86_64-linux-gnu/libm.so.6 "$place/_ttml.abi3.so"; }}
"""
# The part of ttml in Python imports the compiled one, which must be on Python's path; here it is only looked for.
IMPORT = """
import importlib.util as _util

if _util.find_spec("_ttml") is None:
    raise ModuleNotFoundError("No module named '_ttml'")
"""
INSTALL = """\
#!/bin/bash
DEB_URL="https://github.com/tenstorrent/ompi/releases/download/v{0}/openmpi-ulfm_{0}-1_amd64.deb"
"""


def sfpi(folder: Path, version: str) -> Path:
    """Return where SFPI's release file of that version lies."""
    return folder / f"github/tenstorrent/sfpi/releases/download/{version}/sfpi_{version}_x86_64_debian.deb"


def openmpi(folder: Path, version: str) -> Path:
    """Return where OpenMPI's release file of that version lies."""
    return folder / f"github/tenstorrent/ompi/releases/download/v{version}/openmpi-ulfm_{version}-1_amd64.deb"


def make_releases(folder: Path, sfpi_version: str, openmpi_version: str) -> None:
    """Write the release files below `folder`, at the paths of github.com: empty packages."""
    for name, path in (("sfpi", sfpi(folder, sfpi_version)), ("openmpi-ulfm", openmpi(folder, openmpi_version))):
        archive.package(path.parent, name).rename(path)


def make_repositories(
    folder: Path, *, tag: str, sfpi_version: str, openmpi_version: str, ttml: str | None = None, torch: bool = False
) -> None:
    """Write tt-metal, which names the release files that are there, and its submodule, at the paths of github.com."""
    umd = folder / "umd"
    machines.write(umd / "README.md", "stands for tt-umd\n")
    commit_all(umd)
    publish(umd, folder / "github/tenstorrent/tt-umd.git")
    tree = folder / "tt-metal"
    write_tree(tree, folder, sfpi_version, openmpi_version, torch)
    run("git", "init", "--quiet", "--initial-branch=main", cwd=tree)
    machines.write(tree / ".gitmodules", GITMODULES)
    submodule = run("git", "rev-parse", "HEAD", cwd=umd)
    run("git", "update-index", "--add", "--cacheinfo", f"160000,{submodule},{UMD}", cwd=tree)
    publish_tree(folder, tag, ttml)


def publish_tree(folder: Path, tag: str, ttml: str | None) -> None:
    """Commit a build that leaves _ttml*.so in the folder `ttml` of its tree, or nowhere; tag it, and serve it.

    A branch has the tag's name and is another commit: whoever does not name the tag in full takes that.
    """
    tree = folder / "tt-metal"
    machines.write(tree / "build_metal.sh", BUILD.format(umd=UMD, place=ttml or ""))
    (tree / "build_metal.sh").chmod(0o755)
    commit_all(tree)
    run("git", "tag", "--annotate", "--force", "--message", tag, tag, cwd=tree, **AUTHOR)
    another = run("git", "commit-tree", "HEAD^{tree}", "-m", "A branch's", cwd=tree, **AUTHOR)
    run("git", "update-ref", f"refs/heads/{tag}", another, cwd=tree)
    publish(tree, folder / "github/tenstorrent/tt-metal.git")


def write_tree(tree: Path, folder: Path, sfpi_version: str, openmpi_version: str, torch: bool) -> None:
    """Write the files of tt-metal that the image's build reads, checks, or keeps."""
    pin = sha256_file(sfpi(folder, sfpi_version))
    hashes = (f"sfpi_x86_64_debian_{kind}_hash='{value}'" for kind, value in (("txz", "a" * 64), ("deb", pin)))
    lines = (f"# sfpi release {sfpi_version}", f"sfpi_version='{sfpi_version}'", *hashes)
    machines.write(tree / "tt_metal/sfpi-version", "\n".join(lines) + "\n")
    machines.write(tree / "install_dependencies.sh", INSTALL.format(openmpi_version))
    for place in ("cmake/x86_64-linux-gcc-12-toolchain.cmake", "runtime/README.md", "tt-train/configs/README.md"):
        machines.write(tree / place, "stands for tt-metal's\n")
    for board in table().values():
        if board.mesh_graph_descriptor:
            path = tree / f"tt_metal/fabric/mesh_graph_descriptors/{board.mesh_graph_descriptor}.textproto"
            path.parent.mkdir(parents=True, exist_ok=True)
            machines.descriptor(path.parent, board.name).rename(path)
    for name, place in (("ttnn", "ttnn/ttnn"), ("ttml", "tt-train/sources/ttml/ttml")):
        if torch:
            shutil.copytree(doubles.HERE / name, tree / place, ignore=shutil.ignore_patterns("__pycache__"))
        machines.write(
            tree / place / "__init__.py", read(tree / place / "__init__.py") + (IMPORT if name == "ttml" else "")
        )


def read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def commit_all(tree: Path) -> None:
    if not (tree / ".git").exists():
        run("git", "init", "--quiet", "--initial-branch=main", cwd=tree)
    run("git", "add", "--all", "--force", ".", f":!{UMD}", cwd=tree)
    run("git", "commit", "--quiet", "--allow-empty", "--message", "A stand-in", cwd=tree, **AUTHOR)


def publish(tree: Path, bare: Path) -> None:
    """Clone a tree to where it is served, and let it be cloned in parts, as GitHub does."""
    shutil.rmtree(bare, ignore_errors=True)
    run("git", "clone", "--quiet", "--bare", str(tree), str(bare))
    for name in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        run("git", "config", name, "true", cwd=bare)


def commit(folder: Path, tag: str) -> str:
    """Return the commit that a tag of tt-metal names."""
    return run("git", "rev-parse", f"refs/tags/{tag}^{{commit}}", cwd=folder / "tt-metal")

"""The working directory of a job as one zip: which files go, which stay, and why.

Knows nothing of Ray. Reads the folder and never writes to it: an output written into a tree while
it is packed changes its hash, and the job dies looking for a package that was never uploaded.
Invariant: the same files give the same bytes, so an unchanged tree is uploaded once.
"""

import fnmatch
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from deploy.errors import PackageRefused

MAX_BYTES = 100 * 2**20
"""Code is never this large; data belongs in a bucket that the nodes can read."""

_IGNORE_FILES = (".gitignore", ".rayignore")
_NEVER_FOLDERS = {".git", ".hg", ".svn", "__pycache__", "node_modules", "mlartifacts", "mlruns"}
_NEVER_FILES = ("*.pyc", ".env", ".env.*", ".netrc", "*.pem", "*.key", "auth_token", "mlflow.db*")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can say; real ones would change the hash


class PackagedFile(NamedTuple):
    """A file that goes, by its path inside the package."""

    name: str
    path: Path
    size: int


class Selection(NamedTuple):
    """What is sent of a folder."""

    files: list[PackagedFile]
    """In the order of their names."""
    left_out: list[tuple[str, str]]
    """(path, why), folders with a closing slash and without what is in them."""

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return sum(file.size for file in self.files)


def select_files(folder: Path, excludes: Sequence[str] = ()) -> Selection:
    """Choose what is sent: all but what git or Ray ignores, `excludes`, secrets and environments.

    Args: excludes: patterns in gitignore's language, relative to `folder`.
    Raises: PackageRefused if there is no such folder, nothing is left, or it is over MAX_BYTES.
    """
    if not folder.is_dir():
        raise PackageRefused(f"{folder}: no such folder; name the project with --working-dir")
    walk = _Walk(folder.resolve(), GitIgnoreSpec.from_lines(excludes), [])
    selection = Selection(list(walk.files(folder.resolve(), [])), walk.left_out)
    selection.files.sort()
    if not selection.files:
        raise PackageRefused(f"{folder}: every file is ignored, there is nothing to run")
    if selection.size > MAX_BYTES:
        raise PackageRefused(_too_large(folder, selection))
    return selection


class _Rules(NamedTuple):
    """The ignore files of one folder."""

    base: Path
    spec: GitIgnoreSpec


class _Walk(NamedTuple):
    """One pass over a folder."""

    root: Path
    excludes: GitIgnoreSpec
    left_out: list[tuple[str, str]]

    def files(self, folder: Path, rules: list[_Rules]) -> Iterator[PackagedFile]:
        """What goes of `folder`, given the rules of the folders above; notes what does not."""
        lines = [
            line
            for name in _IGNORE_FILES
            if (folder / name).is_file()
            for line in (folder / name).read_text().splitlines()
        ]
        if lines:
            rules = [*rules, _Rules(folder, GitIgnoreSpec.from_lines(lines))]
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = Path(entry.path)
            is_folder = entry.is_dir(follow_symlinks=False)
            name = path.relative_to(self.root).as_posix() + "/" * is_folder
            if reason := self._reason(path, name, entry, rules):
                self.left_out.append((name, reason))
            elif is_folder:
                yield from self.files(path, rules)
            else:
                yield PackagedFile(name, path, entry.stat().st_size)

    def _reason(self, path: Path, name: str, entry: "os.DirEntry[str]", rules: list[_Rules]) -> str:
        """Why an entry stays; empty if it goes."""
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and (entry.name in _NEVER_FOLDERS or (path / "pyvenv.cfg").exists()):
            return "never sent"
        if not is_folder and any(fnmatch.fnmatch(entry.name, glob) for glob in _NEVER_FILES):
            return "never sent"
        if self.excludes.match_file(name):
            return "excluded"
        if _ignored(path, is_folder, rules):
            return "ignored"
        if entry.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(self.root):
                return "a link out of the folder"
            return "" if target.is_file() else "a link to a folder or to nothing"
        return "" if is_folder or entry.is_file() else "not a file"


def _ignored(path: Path, is_folder: bool, rules: list[_Rules]) -> bool:
    """The last rule that speaks of the path decides, deeper folders after shallower ones."""
    verdict = False
    for base, spec in rules:
        said = spec.check_file(path.relative_to(base).as_posix() + "/" * is_folder).include
        verdict = verdict if said is None else said
    return verdict


def _too_large(folder: Path, selection: Selection) -> str:
    largest = sorted(selection.files, key=lambda file: -file.size)[:5]
    lines = "\n".join(f"  {megabytes(file.size):>9}  {file.name}" for file in largest)
    return (
        f"{folder}: {megabytes(selection.size)} to upload, at most {megabytes(MAX_BYTES)} are "
        f"sent. The largest files:\n{lines}\n"
        "List them in .gitignore or .rayignore; data belongs where the nodes can read it (s3://)."
    )


def write_zip(selection: Selection, target: Path) -> int:
    """Pack the files, in order, without dates; returns the bytes of the zip."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in selection.files:
            info = zipfile.ZipInfo(file.name, _EPOCH)
            executable = bool(file.path.stat().st_mode & stat.S_IXUSR)
            info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, file.path.read_bytes())
    return target.stat().st_size


def megabytes(size: int) -> str:
    """A size for people: 12.3 MB, 41 kB."""
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.0f} kB"

"""The working directory of a job as one zip: which files go, which stay, and why.

Knows nothing of Ray. Reads the folder and never writes to it: an output written into a tree while
it is packed changes its hash, and the job dies looking for a package that was never uploaded.
Invariant: the same files give the same bytes, so an unchanged tree is uploaded once.
"""

import contextlib
import fnmatch
import os
import pwd
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
_NEVER_FILES = ("*.pyc", "mlflow.db*")
_CREDENTIAL_FOLDERS = (
    ".ssh", ".aws", ".azure", ".kube", ".docker", ".gnupg", ".ray", ".oci", "gcloud",
)  # fmt: skip
"""By their name, wherever they are: programs keep nothing else in them that a job would need."""
_CREDENTIAL_FILES = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass",
    ".my.cnf", ".s3cfg", ".boto", ".git-credentials", ".dockercfg", ".dockerconfigjson",
    ".htpasswd", ".vault-token", "kubeconfig", "*.kubeconfig", "rclone.conf",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.p8", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg",
    "*.tfstate", "*.tfstate.*", "*.tfvars", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "auth_token", "token", "*.token", "*_token", "token.txt", "token.json", "credentials",
    "credentials.csv", "credentials.db", "credentials.ini", "*credentials.json",
    "credentials.toml", "credentials.y*ml", "client_secret*.json", "*service-account*.json",
    "*service_account*.json", "secrets.json", "secrets.toml", "secrets.y*ml",
)  # fmt: skip
"""By their name, in lower case."""
_FORMS = ("*.example", "*.sample", "*.template", "*.dist", "id_*.pub")
_KEY_MARKS = (b'"private_key"', b'"refresh_token"', b'"client_secret"', b"PRIVATE KEY-----")
"""What the text of a key says whatever its file is called: service accounts are often named after
the project."""
_LOOKED_AT = (".json", ".txt", ".yaml", ".yml", ".cfg", ".ini", ".conf", "")
_KEY_BYTES = 64 * 2**10
"""Keys are smaller; a file beyond it is not read."""
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
    Raises: PackageRefused if there is no such folder, it is a home folder or above one, nothing is
        left, or it is over MAX_BYTES.
    """
    if not folder.is_dir():
        raise PackageRefused(f"{folder}: no such folder; name the project with --working-dir")
    if _holds_a_home(folder.resolve()):
        raise PackageRefused(
            f"{folder}: a home folder, or one that holds it, is not sent: what programs keep there "
            "(keys, tokens, histories) would reach the cluster; name the project's own folder with "
            "--working-dir"
        )
    root = folder.resolve()
    walk = _Walk(root, GitIgnoreSpec.from_lines(excludes), [])
    selection = Selection(list(walk.files(root, _rules_above(root))), walk.left_out)
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
        rules = [*rules, *_rules_in(folder)]
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
        if not is_folder and _matches(entry.name, _NEVER_FILES):
            return "never sent"
        if self.excludes.match_file(name):
            return "excluded"
        if _ignored(path, is_folder, rules):
            return "ignored"
        if entry.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(self.root):
                return "a link out of the folder"
            if not target.is_file():
                return "a link to a folder or to nothing"
            return "a link to credentials" if _is_credential(target, self.root) else ""
        if _is_credential(path, self.root):
            return "credentials"
        return "" if is_folder or entry.is_file() else "not a file"


def _rules_in(folder: Path) -> list[_Rules]:
    """Of a folder's own ignore files; one at most."""
    return _rules_of(folder, *(folder / name for name in _IGNORE_FILES))


def _rules_of(base: Path, *files: Path) -> list[_Rules]:
    # Names of files are bytes, and so is what names them: not every one of them is UTF-8.
    lines = [
        line
        for file in files
        if file.is_file()
        for line in os.fsdecode(file.read_bytes()).splitlines()
    ]
    return [_Rules(base, GitIgnoreSpec.from_lines(lines))] if lines else []


def _rules_above(folder: Path) -> list[_Rules]:
    """What the git repository around a folder says of it: that of its top first, as git reads it.

    None where the folder is ignored as a whole, such as one that a build made: it was named on
    purpose, and all of it would stay.
    """
    around = [folder, *folder.parents]
    top = next((place for place in around if (place / ".git").exists()), None)
    if top is None:
        return []
    rules = _rules_of(top, _git_folder(top / ".git") / "info" / "exclude")
    for parent in reversed(around[1 : around.index(top) + 1]):
        rules += _rules_in(parent)
    within = around[: around.index(top)]
    return [] if any(_ignored(place, True, _above(place, rules)) for place in within) else rules


def _above(folder: Path, rules: list[_Rules]) -> list[_Rules]:
    return [each for each in rules if each.base in folder.parents]


def _git_folder(entry: Path) -> Path:
    """Where git keeps what all worktrees share; in a worktree or submodule `.git` is a file."""
    if entry.is_dir():
        return entry
    named = os.fsdecode(entry.read_bytes()).partition("gitdir:")[2].strip()
    place = entry.parent / named
    common = place / "commondir"
    return place / os.fsdecode(common.read_bytes()).strip() if common.is_file() else place


def _holds_a_home(folder: Path) -> bool:
    """Whether `folder` is the user's home, whoever the environment says that is, or above it."""
    homes = [Path("/root"), Path("/home"), Path(os.environ.get("HOME") or "/root")]
    with contextlib.suppress(KeyError):  # A container's user may be a bare number.
        homes.append(Path(pwd.getpwuid(os.getuid()).pw_dir))
    above = any(home.resolve().is_relative_to(folder) for home in homes)
    return above or folder.parent == Path("/home").resolve()


def _is_credential(path: Path, root: Path) -> bool:
    """By its name, those of the folders above it up to `root`, or the text of a key."""
    names = path.relative_to(root).parts
    if any(name.lower() in _CREDENTIAL_FOLDERS for name in names):
        return True
    if not path.is_file():
        return False
    # What a project shows its users: empty forms of the file, by the custom of their names.
    if _matches(path.name, _CREDENTIAL_FILES) and not _matches(path.name, _FORMS):
        return True
    if path.suffix.lower() not in _LOOKED_AT or path.stat().st_size > _KEY_BYTES:
        return False
    with contextlib.suppress(OSError):  # Packing it will say what is wrong with it.
        content = path.read_bytes()
        return any(mark in content for mark in _KEY_MARKS)
    return False


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), glob) for glob in globs)


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

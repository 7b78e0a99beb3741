"""What is sent of a folder, and that packing it changes nothing."""

import os
import zipfile
from pathlib import Path

import pytest

from deploy.errors import PackageRefused
from deploy.package import MAX_BYTES, select_files, write_zip


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _names(root: Path, *excludes: str) -> list[str]:
    return [file.name for file in select_files(root, excludes).files]


def test_ignore_files_rule_their_folder_and_deeper_ones_may_take_back(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            ".gitignore": "/runs/\n*.log\n!keep.log\n",
            ".rayignore": "notes.md",
            "runs/a.py": "",
            "pkg/runs/b.py": "",
            "pkg/x.log": "",
            "pkg/keep.log": "",
            "pkg/.gitignore": "!x.log\nsecret*\n",
            "pkg/secret1": "",
            "notes.md": "",
            "main.py": "",
        },
    )
    expected = [".gitignore", ".rayignore", "main.py", "pkg/.gitignore"]
    assert _names(root) == [*expected, "pkg/keep.log", "pkg/runs/b.py", "pkg/x.log"]
    assert ("runs/", "ignored") in select_files(root).left_out
    assert _names(root, "pkg/", "!notes.md") == [".gitignore", ".rayignore", "main.py"]


def test_a_subfolder_obeys_the_repository_around_it(tmp_path: Path) -> None:
    root = _tree(
        tmp_path / "mono",
        {
            ".git/info/exclude": "scratch\n",
            ".gitignore": "/team/app/data/\n*.log\n*.bin\n",
            "team/.rayignore": "notes.md\n!keep.log\n",
            "team/app/data/clips": "",
            "team/app/x.log": "",
            "team/app/keep.log": "",
            "team/app/w.bin": "",
            "team/app/.gitignore": "!w.bin",
            "team/app/notes.md": "",
            "team/app/scratch": "",
            "team/app/main.py": "",
        },
    )
    # What lies above the repository has no say.
    (tmp_path / ".gitignore").write_text("main.py")
    assert _names(root / "team/app") == [".gitignore", "keep.log", "main.py", "w.bin"]


def test_a_worktree_obeys_the_excludes_of_its_repository(tmp_path: Path) -> None:
    git = _tree(tmp_path / "git", {"info/exclude": "scratch", "worktrees/w/commondir": "../..\n"})
    files = {".git": f"gitdir: {git}/worktrees/w\n", "app/scratch": "", "app/main.py": ""}
    root = _tree(tmp_path / "tree", files)
    assert _names(root / "app") == ["main.py"]


@pytest.mark.parametrize("named", ["build", "build/job"])
def test_an_ignored_folder_that_is_named_is_sent(tmp_path: Path, named: str) -> None:
    root = _tree(tmp_path, {".git/HEAD": "", ".gitignore": "build/", f"{named}/main.py": ""})
    assert _names(root / named) == ["main.py"]


def test_an_ignore_file_need_not_be_utf8(tmp_path: Path) -> None:
    root = _tree(tmp_path, {"main.py": ""})
    (root / ".gitignore").write_bytes(b"# \xe4\ncaf\xe9*\n")
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("")
    assert _names(root) == [".gitignore", "main.py"]


def test_secrets_environments_and_history_never_travel(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            ".git/config": "",
            "py311/pyvenv.cfg": "",
            "py311/lib/x.py": "",
            ".env": "TOKEN=1",
            "tls.key": "",
            "auth_token": "",
            "pkg/__pycache__/x.pyc": "",
            "mlflow.db": "",
            "mlflow.db-wal": "",
            "main.py": "",
        },
    )
    assert _names(root) == ["main.py"]
    assert ("py311/", "never sent") in select_files(root).left_out


CREDENTIALS = {
    ".ssh/config": "",
    ".aws/credentials": "",
    ".kube/config": "",
    ".docker/config.json": "{}",
    ".config/gcloud/application_default_credentials.json": "{}",
    ".git-credentials": "",
    ".netrc": "",
    ".pypirc": "",
    ".npmrc": "",
    ".pgpass": "",
    ".envrc": "",
    "deploy/prod.env": "",
    "deploy/Prod.ENV": "",
    "tls/server.p12": "",
    "tls/server.pem": "",
    "keys/id_ed25519": "",
    "keys/deploy": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "my-project-1a2b3c.json": '{"type": "service_account", "private_key": "-----BEGIN"}',
    "hf_token": "",
    "service.token": "",
    "infra/terraform.tfstate": "",
    ".streamlit/secrets.toml": "",
}
HARMLESS = {
    "main.py": "PRIVATE_KEY = '-----BEGIN RSA PRIVATE KEY-----'  # what a scanner looks for",
    "tokenizer.json": "{}",
    "pkg/token.py": "",
    ".env.example": "TOKEN=",
    "configs/environment.yaml": "",
    "keys/id_ed25519.pub": "",
}


def test_credentials_never_travel_and_are_listed(tmp_path: Path) -> None:
    _tree(tmp_path, CREDENTIALS | HARMLESS)
    selection = select_files(tmp_path)
    assert [file.name for file in selection.files] == sorted(HARMLESS)
    left_out = tuple(name for name, why in selection.left_out if "credentials" in why)
    assert all(name.startswith(left_out) for name in CREDENTIALS)
    assert _names(tmp_path, "!*.env", "!.ssh/") == sorted(HARMLESS)  # No pattern takes one back.


def test_a_link_to_credentials_is_no_way_out(tmp_path: Path) -> None:
    root = _tree(tmp_path, {"main.py": "", ".env": "TOKEN=1", ".aws/config": "key", "a/b.py": ""})
    (root / "settings").symlink_to(".env")
    (root / "a" / "aws.txt").symlink_to("../.aws/config")
    (root / "again").symlink_to("settings")
    assert _names(root) == ["a/b.py", "main.py"]
    left_out = dict(select_files(root).left_out)
    assert left_out["settings"] == left_out["again"] == "a link to credentials"


def test_a_home_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _tree(tmp_path / "home" / "user" / "project", {"main.py": ""})
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "user"))
    assert _names(project) == ["main.py"]
    (tmp_path / "alias").symlink_to(project.parent)
    for folder in (project.parent, tmp_path / "home", tmp_path / "alias", Path("/"), Path("/root")):
        with pytest.raises(PackageRefused, match="home folder"):
            select_files(folder)


def test_links_that_leave_the_folder_stay_and_links_inside_become_files(tmp_path: Path) -> None:
    outside = _tree(tmp_path / "outside", {"data.bin": "big"})
    root = _tree(tmp_path / "root", {"main.py": "pass"})
    (root / "shared").symlink_to(outside)
    (root / "data.bin").symlink_to(outside / "data.bin")
    (root / "alias.py").symlink_to(root / "main.py")
    (root / "dangling").symlink_to(root / "nothing")
    assert _names(root) == ["alias.py", "main.py"]
    assert {name for name, _ in select_files(root).left_out} == {"shared", "data.bin", "dangling"}


def test_same_files_give_same_bytes_and_the_tree_is_not_touched(tmp_path: Path) -> None:
    root = _tree(tmp_path / "root", {"b.sh": "#!/bin/sh", "a/x.py": "pass"})
    (root / "b.sh").chmod(0o755)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    write_zip(select_files(root), tmp_path / "1.zip")
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before
    os.utime(root / "b.sh", (1e9, 1e9))
    write_zip(select_files(root), tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    (root / "b.sh").write_text("#!/bin/bash")
    write_zip(select_files(root), tmp_path / "3.zip")
    assert (tmp_path / "1.zip").read_bytes() != (tmp_path / "3.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["a/x.py", "b.sh"]
        assert archive.getinfo("b.sh").external_attr >> 16 & 0o111


def test_too_large_a_folder_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    _tree(tmp_path, {"main.py": "pass"})
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PackageRefused, match=r"100\.0 MB  weights\.bin"):
        select_files(tmp_path)
    assert _names(tmp_path, "*.bin") == ["main.py"]


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageRefused, match="nothing to run"):
        select_files(tmp_path)
    with pytest.raises(PackageRefused, match="no such folder"):
        select_files(tmp_path / "missing")

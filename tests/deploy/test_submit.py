"""A job handed to a real head node, with token authentication as Ray has it on by default."""

import asyncio
import ipaddress
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import aiohttp
import aiohttp.web
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.polling import wait_until
from support.ports import free_ports

from deploy.connect import connect, nodes_of
from deploy.errors import AccessRefused, ClusterUnreachable, DeployError
from deploy.jobs import INTERRUPTED, follow, jobs, stop
from deploy.submit import submit
from diccae.cli import main

TOKEN = "4f9c" * 16
MAIN = """
import os, signal, sys, time
print("args", sys.argv[1:], os.environ.get("COLOUR"), os.path.exists("left-out.bin"), flush=True)
if sys.argv[1] == "fail":
    sys.exit(3)
if sys.argv[1] == "count":
    for i in range(12):
        print("line", i, flush=True)
        while i == 5 and not os.path.exists(sys.argv[2]):
            time.sleep(0.1)
    sys.exit(5)
if sys.argv[1] == "sleep":
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        print("kept", flush=True)
if sys.argv[1] == "save":
    # Ends by itself, and later than Ray's own three seconds after the signal.
    def save(*_):
        time.sleep(4)
        print("saved", flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(300)
"""


def _head_process(folder: Path, ports: list[int]) -> "subprocess.Popen[bytes]":
    gcs, dashboard, client, agent = ports
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/ray"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(folder)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # a job's `python` is the head's
    (folder / "ray").mkdir()
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)


def _wait_for(head: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + 400
    while True:
        try:
            connect(address)
            return
        except ClusterUnreachable:
            assert head.poll() is None, f"the head ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"no head after 400 s: {log.read_text()}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a head node with its own ports, folder and token."""
    ports = free_ports(4)
    address = f"http://127.0.0.1:{ports[1]}"
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with tempfile.TemporaryDirectory(prefix="dh", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        process = _head_process(Path(tmp), ports)
        try:
            _wait_for(process, address, Path(tmp) / "log")
            yield address
        finally:
            for part in psutil.Process(process.pid).children(recursive=True):
                part.kill()
            process.kill()
            process.wait(20)
    patch.undo()


@pytest.fixture(autouse=True)
def _no_other_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of whoever runs the tests must not decide them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "diccae").mkdir(parents=True)
    (folder / "diccae" / "__init__.py").write_text("")
    (folder / "diccae" / "__main__.py").write_text(MAIN)
    (folder / ".gitignore").write_text("*.bin\n")
    (folder / "left-out.bin").write_bytes(bytes(1000))
    return folder


class Screen:
    """What the user would see."""

    def __init__(self) -> None:
        self.said, self.log = "", ""

    def say(self, line: str) -> None:
        self.said += line + "\n"

    def write(self, text: str) -> None:
        self.log += text


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_the_nodes_of_a_cluster_are_known_before_a_job_is_sent(head: str) -> None:
    cluster = connect(head)
    # The head answers a second before it is a node.
    wait_until(lambda: nodes_of(cluster), 60, "the head in its own list")
    assert nodes_of(cluster) == [(2.0, 0.0, False)]


@pytest.mark.usefixtures("token")
def test_job_runs_the_packed_code_and_its_own_exit_code_comes_back(
    head: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray's client would prefer it
    before = sorted(path for path in project.rglob("*"))
    failing = Screen()
    args = {"working_dir": project, "say": failing.say, "write": failing.write}
    assert submit(head, ["fail"], wait=False, **args) == 0
    assert failing.log == ""

    screen = Screen()
    code = submit(
        head,
        ["pretrain", "--name", "two words"],
        working_dir=project,
        env={"COLOUR": "blue"},
        say=screen.say,
        write=screen.write,
    )
    assert code == 0, screen.log
    assert "args ['pretrain', '--name', 'two words'] blue False" in screen.log
    assert "left out left-out.bin" in screen.said
    assert "3 files" in screen.said
    assert sorted(path for path in project.rglob("*")) == before

    job_id = failing.said.split("diccae logs ")[1].split()[0]
    assert follow(head, job_id, say=failing.say, write=failing.write) == 3
    assert "exit code 3" in failing.said
    assert "args ['fail']" in failing.log


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_ctrl_c_detaches_and_the_job_can_be_followed_and_stopped(head: str, project: Path) -> None:
    screen = Screen()

    def interrupt(text: str) -> None:
        screen.write(text)
        if "args ['sleep']" in screen.log:
            os.kill(os.getpid(), signal.SIGINT)

    code = submit(head, ["sleep"], working_dir=project, say=screen.say, write=interrupt)
    assert code == INTERRUPTED
    job_id = screen.said.split("diccae logs ")[1].split()[0]
    assert f"diccae logs {job_id} --follow --address {head}" in screen.said
    assert f"diccae stop {job_id} --address {head}" in screen.said
    assert stop(head, job_id, say=screen.say) == 0
    again = Screen()
    assert follow(head, job_id, say=again.say, write=again.write) == INTERRUPTED
    assert "args ['sleep']" in again.log


@pytest.mark.usefixtures("token")
def test_jobs_are_listed_read_and_stopped_by_commands(
    head: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    screen = Screen()
    args = {"working_dir": project, "say": screen.say, "write": screen.write}
    submit(head, ["save", "--out", str(run)], wait=False, **args)
    job_id = screen.said.split("diccae logs ")[1].split()[0]
    wait_until(lambda: "ready" in _read(job_id, head, capsys), 60, "the job's first line")
    run.mkdir()
    record = {"job": job_id, "attempt": 3, "mlflow": {"uri": "http://mlflow:5000", "run_id": "7f"}}
    (run / "run.json").write_text(json.dumps(record))

    assert main(["jobs", "--address", head, "--runs", "--last", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    for shown in (job_id, "RUNNING", " 3 ", "http://mlflow:5000/#/runs/7f", f"save --out {run}"):
        assert shown in row

    assert main(["stop", job_id, "--address", head]) == 0
    said = capsys.readouterr().err
    assert f"{job_id} is STOPPED after " in said
    assert f"{run} keeps what was done" in said
    assert _read(job_id, head, capsys).endswith("ready\nsaved\n")
    assert main(["stop", job_id, "--address", head]) == 0
    assert "over already" in capsys.readouterr().err

    assert main(["jobs", "--address", head, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (listed["id"], listed["state"], listed["out"]) == (job_id, "STOPPED", str(run))


def _read(job_id: str, head: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["logs", job_id, "--address", head]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("token")
@pytest.mark.parametrize("command", ["logs", "stop"])
def test_an_unknown_job_is_told_with_the_nearest_and_the_last(
    command: str, head: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (known := jobs(head)):
        submit(head, ["x"], working_dir=project, wait=False, say=print, write=print)
        known = jobs(head)
    right = known[-1].id
    assert main([command, right[:-1] + "#", "--address", head]) == 1
    said = capsys.readouterr().err
    assert f"did you mean {right}" in said
    assert f"its last: {known[0].id} ({known[0].command.split()[0]}, " in said
    assert said.count("\n") == 1
    assert main([command, "nowhere", "--address", head]) == 1
    assert "did you mean" not in capsys.readouterr().err


class _HangsUp:
    """A proxy before the head that closes a log's stream in due form after its first message, as
    one does whose stream was silent for long."""

    def __init__(self, head: str, times: int, done: Path) -> None:
        self.head, self.left, self.done = head, times, done

    async def answer(self, request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
        kept = ("Authorization", "Content-Type")
        headers = {name: request.headers[name] for name in kept if name in request.headers}
        url = f"{self.head}{request.path_qs}"
        async with aiohttp.ClientSession(headers=headers) as session:
            if request.headers.get("Upgrade", "").lower() != "websocket":
                async with session.request(request.method, url, data=await request.read()) as got:
                    return aiohttp.web.Response(body=await got.read(), status=got.status)
            there = aiohttp.web.WebSocketResponse()
            await there.prepare(request)
            # The head answers a close only when it has more to say.
            soon = aiohttp.ClientWSTimeout(ws_close=0.1)
            async with session.ws_connect(url, timeout=soon) as here:
                async for message in here:
                    await there.send_str(message.data)
                    if self.left:
                        self.left -= 1
                        break
                    self.done.touch()
            await there.close()
            return there


@contextmanager
def _served(proxy: _HangsUp, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a proxy."""
    loop = asyncio.new_event_loop()
    app = aiohttp.web.Application(client_max_size=2**25)
    app.router.add_route("*", "/{path:.*}", proxy.answer)
    runner = aiohttp.web.AppRunner(app)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(runner.setup(), loop).result(20)
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    asyncio.run_coroutine_threadsafe(site.start(), loop).result(20)
    yield runner.addresses[0][1]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_a_log_whose_stream_closes_quietly_loses_and_repeats_no_line(
    head: str, project: Path, tmp_path: Path
) -> None:
    proxy, screen = _HangsUp(head, times=3, done=tmp_path / "done"), Screen()
    command = ["count", str(proxy.done)]
    with _served(proxy) as port:
        address = f"http://127.0.0.1:{port}"
        code = submit(address, command, working_dir=project, say=screen.say, write=screen.write)
    assert proxy.left == 0
    lines = [line for line in screen.log.splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(12)]
    assert screen.log.count("args ['count'") == 1
    assert code == 5


def _self_signed(folder: Path) -> Path:
    """A PEM file with the certificate of 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ours")])
    now = datetime.now(UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    builder = builder.add_extension(host, False).add_extension(constraints, True)
    signed = builder.sign(key, hashes.SHA256())
    kind = serialization.PrivateFormat.PKCS8
    plain = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    path = folder / "ours.pem"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + plain)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("token")
def test_a_cluster_behind_an_authority_of_our_own_is_spoken_to_and_its_log_read(
    head: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream of the log has a client of its own, which looked at another variable."""
    pem, screen = _self_signed(tmp_path), Screen()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    with _served(_HangsUp(head, times=0, done=tmp_path / "done"), tls) as port:
        address = f"https://127.0.0.1:{port}"
        with pytest.raises(ClusterUnreachable, match="certificate is not trusted here"):
            connect(address)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
        told = {"say": screen.say, "write": screen.write}
        assert submit(address, ["fail"], working_dir=project, **told) == 3
    assert "args ['fail'" in screen.log
    assert "log lost" not in screen.said


def test_no_token_and_a_wrong_token_are_refused_with_the_way_out(
    head: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessRefused, match="RAY_AUTH_TOKEN_PATH") as missing:
        submit(head, ["pretrain"], working_dir=project, say=print, write=print)
    assert "there is none here" in str(missing.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(AccessRefused, match="refuses the token of RAY_AUTH_TOKEN"):
        connect(head)


def test_the_default_token_file_of_ray_is_found(head: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert connect(head).headers["Authorization"].endswith(TOKEN)


class _OldRay(BaseHTTPRequestHandler):
    """A cluster of another Ray version that takes no job."""

    def do_GET(self) -> None:
        found = self.path == "/api/version"
        self.send_response(200 if found else 500)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.9.0"}).encode() if found else b"broken")

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def old_ray() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _OldRay)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_another_ray_version_is_named_and_an_open_cluster_gets_no_token(
    old_ray: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert connect(old_ray).headers == {}
    screen = Screen()
    with pytest.raises(DeployError, match="did not take the job"):
        submit(old_ray, ["x"], working_dir=project, say=screen.say, write=screen.write)
    assert "the cluster runs Ray 2.9.0" in screen.said


def test_paths_that_do_not_travel_are_named(old_ray: str, project: Path, tmp_path: Path) -> None:
    screen = Screen()
    args = ["ingest", "--clips", "left-out.bin", f"--store={tmp_path}", "--videos", "s3://b/x"]
    args += ["--config", "diccae/../diccae", "--out", "s3://b/new-folder", "-x", "."]
    with pytest.raises(DeployError):
        submit(old_ray, args, working_dir=project, say=screen.say, write=screen.write)
    named = [line for line in screen.said.splitlines() if line.startswith(("note", "warning  l"))]
    assert [line.split()[1] for line in named] == ["left-out.bin", str(tmp_path)]


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "--store", "s3://b/s", "--out", "out/run"],
        ["pretrain", "--store=out/store", "--out", "s3://b/o"],
        ["ingest", "--store", "diccae"],
    ],
    ids=" ".join,
)
def test_what_a_job_would_write_into_its_copy_of_the_code_is_refused(
    words: list[str], project: Path
) -> None:
    """Ray removes that copy, and the same command finds another one once a file has changed."""
    with pytest.raises(DeployError, match=r"--(out|store) [a-z/]+: a folder of the job's own copy"):
        submit("http://127.0.0.1:9", words, working_dir=project, say=print, write=print)
    sent = ["evaluate", "--store", "diccae", "--out", "/runs/one"]
    with pytest.raises(ClusterUnreachable):
        submit("http://127.0.0.1:9", sent, working_dir=project, say=print, write=print)


def test_a_folder_that_a_command_takes_by_default_is_refused_as_one_that_is_named(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    options = ["--address", "http://127.0.0.1:9"]
    assert main(["submit", *options, "--", "demo"]) != 0
    assert "--out out/demo: a folder of the job's own copy" in capsys.readouterr().err
    assert main(["submit", *options, "--", "demo", "--out", "s3://b/demo"]) != 0
    assert "http://127.0.0.1:9: no answer" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["mine.yaml", "in-the-image.yaml", "s3://b/mine.yaml"])
def test_a_default_folder_is_refused_whichever_config_is_named(
    config: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mine.yaml").write_text("seed: 1\n")
    options = ["--address", "http://127.0.0.1:9", "--working-dir", str(project)]
    assert main(["submit", *options, "--", "demo", "--config", config]) != 0
    assert "--out out/demo: a folder of the job's own copy" in capsys.readouterr().err
    named = ["--out", "s3://b/demo"]
    assert main(["submit", *options, "--", "demo", f"--config={config}", *named]) != 0
    assert "http://127.0.0.1:9: no answer" in capsys.readouterr().err


def test_the_config_that_is_sent_is_read_before_it_is(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mine.yaml").write_text("sead: 1\n")
    options = ["--address", "http://127.0.0.1:9", "--working-dir", str(project)]
    words = ["pretrain", "--config", "mine.yaml", "--store", "s3://b/s", "--out", "s3://b/o"]
    assert main(["submit", *options, "--", *words]) == 2
    assert f"{project}/mine.yaml: unknown key sead: did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [("ray://head:10001", "http://head:8265"), ("http://127.0.0.1:9", "no answer")],
)
def test_an_address_that_cannot_work_says_what_would(address: str, message: str) -> None:
    with pytest.raises(DeployError, match=message):
        connect(address, timeout_s=5)


def test_a_home_folder_is_refused_before_the_cluster_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HOME is `tmp_path` here."""
    (tmp_path / "main.py").write_text("")
    options = ["--address", "http://127.0.0.1:1", "--working-dir", str(tmp_path)]
    assert main(["submit", *options, "--", "doctor"]) == 2
    assert "a home folder" in capsys.readouterr().err

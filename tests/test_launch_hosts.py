"""`--hosts` with Open MPI and ssh, on two hosts made of network namespaces. Skipped where that cannot be:
needs root and

    apt install openmpi-bin openssh-server openssh-client iproute2
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.launching import DISTRIBUTED, SBIN, run, start, wait_for, write_script

SSHD = """\
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/hostkey
PidFile none
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp /usr/lib/openssh/sftp-server
ForceCommand {folder}/session
SetEnv LAB_UV="{parts}/uv" PYTHON="{python}" STAND_IN={stand_in} PATH="{path}"
"""
SUBNET = "10.213.77"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two network namespaces with an sshd each, called lab1 and lab2; `private`: they do not see the checkout."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder, self.checkout, self.daemons = folder, checkout, []
        for name in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        entries = "".join(f"Host lab{i}\n  HostName {SUBNET}.{i}\n" for i in (1, 2))
        (folder / "config").write_text(entries + f"Host *\n  User root\n  IdentityFile {folder}/id\n  LogLevel ERROR\n"
                                       "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n")
        (folder / "bin").mkdir()
        for name in ("ssh", "scp"):
            write_script(folder / "bin" / name, f"#!/bin/sh\nexec {shutil.which(name)} -F {folder}/config \"$@\"\n")
        ip("link", "add", "labbr", "type", "bridge")
        ip("addr", "add", f"{SUBNET}.254/24", "dev", "labbr")
        ip("link", "set", "labbr", "up")
        for i in (1, 2):
            etc = Path(f"/etc/netns/lab{i}")
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{SUBNET}.1 lab1\n{SUBNET}.2 lab2\n")
            ip("netns", "add", f"lab{i}")
            ip("link", "add", f"labv{i}", "type", "veth", "peer", "name", "eth0", "netns", f"lab{i}")
            ip("link", "set", f"labv{i}", "master", "labbr", "up")
            ip("-n", f"lab{i}", "addr", "add", f"{SUBNET}.{i}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                ip("-n", f"lab{i}", "link", "set", name, "up")

    def serve(self, stand_in: str = "1", private: bool = False) -> dict[str, str]:
        """Starts both sshd afresh; the variables with which `ssh lab1` works."""
        self.stop()
        Path("/run/sshd").mkdir(exist_ok=True)
        parts = self.checkout.parent
        (self.folder / "sshd.conf").write_text(SSHD.format(folder=self.folder, parts=parts, python=sys.executable,
                                                           stand_in=stand_in, path=SBIN))
        # Each host has a home of its own.
        write_script(self.folder / "session", f"""#!/bin/sh
export HOME="{self.folder}/home-$(uname -n)"
mkdir -p "$HOME" && cd "$HOME" && exec bash -c "$SSH_ORIGINAL_COMMAND"
""")
        for i in (1, 2):
            hide = f"mount -t tmpfs none '{self.checkout}' &&" if private else ""
            self.daemons.append(subprocess.Popen(
                ["ip", "netns", "exec", f"lab{i}", "unshare", "--uts", "--mount", "bash", "-c",
                 f"hostname lab{i} && {hide} exec {shutil.which('sshd', path=SBIN)} -D -f {self.folder}/sshd.conf"]))
        environ = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "OMPI_MCA_oob_tcp_if_include": f"{SUBNET}.0/24"}
        for i in (1, 2):
            wait_for(lambda i=i: not subprocess.run([self.folder / "bin/ssh", f"lab{i}", "true"]).returncode, 20, "ssh")
        return environ

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(10)
        self.daemons = []

    def remove(self) -> None:
        self.stop()
        for i in (1, 2):
            subprocess.run(["ip", "netns", "del", f"lab{i}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/lab{i}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", "labbr"], capture_output=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Hosts]:
    missing = [p for p in ("mpirun", "sshd", "ssh-keygen", "ip", "unshare") if not shutil.which(p, path=SBIN)]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'no more programs'} (apt install openmpi-bin "
                    "openssh-server openssh-client iproute2)")
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"network namespaces are not allowed here: {allowed.stderr.decode().strip()}")
    made = None
    try:
        made = Hosts(tmp_path_factory.mktemp("hosts"), checkout)
        yield made
    finally:
        if made:
            made.remove()


def test_hosts_on_a_shared_disk(checkout, environ, hosts):
    done = run(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--note",
               "two words, $HOME", "--run-dir", "runs/two hosts")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 arguments ['experiments/tiny.py', '--note', 'two words, $HOME'," in done.stdout
    assert done.stdout.count(f"{SUBNET}.1:") == 2, "both know where process 0 is"


def test_hosts_a_failing_process_ends_the_others(checkout, environ, hosts):
    began = time.monotonic()
    done = run(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--hang", "--fail")
    assert done.returncode == 7, done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_hosts_save_when_the_launcher_is_told_to_stop(checkout, environ, hosts, number, status):
    folder = checkout / f"runs/stop-{status}"
    process = start(checkout, environ | hosts.serve(), "--hosts", "lab1,lab2", "experiments/tiny.py", "--hang",
                    "--run-dir", f"runs/stop-{status}")
    wait_for(lambda: len(list(folder.glob("up-*"))) == 2, 60, "the start of both processes")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    assert all((folder / f"saved-{rank}").exists() for rank in (0, 1))
    assert "save and stop" in err and "Traceback" not in err and "Primary job" not in err


def test_hosts_without_a_shared_disk_get_a_copy(checkout, environ, hosts):
    variables = environ | hosts.serve(private=True)
    done = run(checkout, variables, "--hosts", "lab1,lab2", "experiments/tiny.py")
    assert done.returncode == 2 and "do not all see" in done.stderr and "--checkpoint-dir gs://" in done.stderr
    done = run(checkout, variables, "--hosts", "lab2", "experiments/tiny.py", "--run-dir", "runs/one copy")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout and "run folder: " in done.stderr
    assert (checkout / "runs/one copy/ran-0").exists(), "it ran where this folder cannot be seen, and was fetched"
    done = run(checkout, variables, "--hosts", "lab1,lab2", "experiments/tiny.py", "--run-dir", "runs/two copies",
               "--checkpoint-dir", "gs://bucket/x")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 arguments ['experiments/tiny.py'," in done.stdout
    assert [p.name for p in (checkout / "runs/two copies").glob("ran-*")] == ["ran-0"], "that of the first host"


def test_hosts_names_the_host_that_refuses(checkout, environ, hosts):
    variables = environ | hosts.serve()
    done = run(checkout, variables, "--hosts", f"lab1,{SUBNET}.254", "experiments/tiny.py")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"ssh to {SUBNET}.254 failed: " in done.stderr and "refused" in done.stderr


def test_hosts_train(checkout, environ, hosts):
    """Real training: on two hosts where the code knows several processes, else on one."""
    names = "lab1,lab2" if DISTRIBUTED else "lab1"
    done = run(checkout, environ | hosts.serve(stand_in=""), "--hosts", names, "experiments/tiny.py", "--run-dir",
               "runs/real hosts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "runs/real hosts/result.json").exists()


@pytest.mark.skipif(not DISTRIBUTED, reason="the code knows one process only")
def test_hosts_training_saves_on_ctrl_c(checkout, environ, hosts):
    process = start(checkout, environ | hosts.serve(stand_in=""), "--hosts", "lab1,lab2", "experiments/tiny.py",
                    "--steps", "100000", "--checkpoint.every", "100000", "--evaluate.every", "100000",
                    "--run-dir", "runs/long hosts")
    folder = checkout / "runs/long hosts"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, 120, "training")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert list((folder / "checkpoints").glob("[0-9]*")), out


# --- the real gcloud, a stand-in for Google's API, and the two hosts as workers of a TPU VM ---------------------------


class Api(BaseHTTPRequestHandler):
    """As much of the Cloud TPU and Compute APIs as gcloud asks for; the VM exists once it was requested."""

    requested = False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        path, code = self.path.partition("?")[0], 200
        if self.command == "POST" and path.endswith("/queuedResources"):
            Api.requested = True
            value = {"name": "projects/p/locations/z-a/operations/1", "done": True}
        elif path.endswith(":getGuestAttributes"):
            value = {"guestAttributes": [{"queryValue": {"items": []}}] * 2}
        elif "/nodes/" in path or "/queuedResources/" in path:
            value = {"name": f"projects/p/locations/z-a/nodes/{path.rpartition('/')[2]}", "health": "HEALTHY",
                     "acceleratorType": "v6e-8", "runtimeVersion": "v2-alpha-tpuv6e", "apiVersion": "V2",
                     "state": "READY" if "/nodes/" in path else {"state": "ACTIVE"},
                     "networkEndpoints": [{"ipAddress": ip, "port": 8470, "accessConfig": {"externalIp": ip}}
                                          for ip in (f"{SUBNET}.1", f"{SUBNET}.2")]}
            if not Api.requested:
                code, value = 404, {"error": {"code": 404, "status": "NOT_FOUND", "message": "pod was not found"}}
        elif "/operations/" in path:
            value = {"name": path[4:], "done": True}
        else:
            value = {"commonInstanceMetadata": {"items": []}, "name": "p"}
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *words: object) -> None:
        """Says nothing."""


def test_tpu_with_the_real_gcloud(checkout, environ, hosts, tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("the Google Cloud CLI is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    (tmp_path / "token").write_text("token")
    variables = environ | hosts.serve(private=True) | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": url, "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": url,
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"), "CLOUDSDK_CONFIG": str(tmp_path / "config"),
        "CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true", "LAB_POLL_SECONDS": "5"}
    try:
        done = run(checkout, variables, "--tpu", "pod", "--zone", "z-a", "--create", "v6e-16", "--gcloud-flags",
                   f"--plain --ssh-key-file={hosts.folder}/id", "experiments/tiny.py", "--note", "two words, $HOME",
                   "--run-dir", "runs/real gcloud", "--checkpoint-dir", "gs://bucket/tpu")
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 of None arguments ['experiments/tiny.py', '--note', 'two words, $HOME'," in done.stdout
    assert "rank 2" not in done.stdout, "the output is that of worker 0"
    for i in (1, 2):
        ran = hosts.folder.glob(f"home-lab{i}/.cache/lab/checkouts/*/runs/real gcloud/ran-{i}")
        assert list(ran), f"worker {i - 1} ran, too"
    assert [p.name for p in (checkout / "runs/real gcloud").glob("ran-*")] == ["ran-1"], "that of worker 0"

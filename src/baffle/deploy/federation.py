"""A whole federation on this machine, each part a process of its own: for development, the demo, tests and benchmarks.

The processes are those of a deployment (docs/deploy.md): a SuperLink with a database, a SuperExec beside it that
starts ServerApps (so that these outlive a SuperLink that crashes), and stateful clients (``baffle node``); with TLS
and node authentication, or in plain text on the loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.deploy.certificates import make_certificates, private_bytes, write_secret
from baffle.deploy.flower.keys import read_key
from baffle.errors import FederationError

_BIN = Path(sys.executable).parent
_PATIENCE = 60.0  # seconds for a process to start


class Federation:
    """SuperLink, SuperExec and clients as processes; to be closed, or used in a ``with``.

    Args:
        folder: Where keys, certificates, logs and the SuperLink's database are.
        secure: Make certificates and keys, and let only registered keys in.
        port: Of the loopback interface; by default a free one.
    """

    def __init__(self, folder: Path, *, secure: bool = True, port: int | None = None) -> None:
        self.folder, self.secure = folder.resolve(), secure
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.superlink: subprocess.Popen[bytes] | None = None
        self.superexec: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, list[str]] = {}
        self._secret = self.folder / "superexec.secret"
        (self.folder / "flwr").mkdir(parents=True, exist_ok=True)
        self.certificates = make_certificates(self.folder) if secure else None
        if not self._secret.exists():
            self._secret.touch(0o600)
            self._secret.write_text(secrets.token_hex(32))
        tls = f'root-certificates = "{self.certificates}"' if secure else "insecure = true"
        (self.folder / "flwr/config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{self.address}"\n{tls}\n'
        )

    def __enter__(self) -> Federation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment with which ``flwr`` reaches this federation, and sends no telemetry."""
        return {
            **os.environ,
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # flwr starts its own commands by name
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self) -> None:
        """Start SuperLink and SuperExec, and wait until they can be reached."""
        self.start_superlink()
        command: list[str | Path] = [_BIN / "flower-superexec", "--runtime-api-address", self.address]
        command += ["--superexec-auth-secret-file", self._secret, *self._tls("--root-certificates")]
        self.superexec = self.start_process("superexec", command)

    def start_superlink(self) -> None:
        """Start the SuperLink, or restart it with the same database."""
        command: list[str | Path] = [_BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--database", self.folder / "superlink.db", "--isolation", "process"]
        command += ["--superexec-auth-secret-file", self._secret, "--disable-runtime-dependency-installation"]
        if self.secure:
            command += ["--ssl-ca-certfile", self.folder / "ca.crt", "--ssl-certfile", self.folder / "server.pem"]
            command += ["--ssl-keyfile", self.folder / "server.key", "--enable-supernode-auth"]
        else:
            command += ["--insecure"]
        self.superlink = self.start_process("superlink", command)
        give_up = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self.superlink.poll() is not None or time.monotonic() > give_up:
                raise FederationError(f"the SuperLink did not start: see {self.folder / 'superlink.log'}")
            time.sleep(0.1)

    def make_key(self, name: str, *, register: bool = True) -> Path:
        """Make a node's key, and register it if the SuperLink requires that; return the file of the private key."""
        file = self.folder / f"{name}.key"
        if not file.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            write_secret(file, private_bytes(key, serialization.PrivateFormat.OpenSSH))  # what flower-supernode reads
        public = file.with_suffix(".pub")
        encoding, kind = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        public.write_bytes(read_key(file).public_key().public_bytes(encoding, kind) + b"\n")
        if register and self.secure:
            try:
                self.flwr("supernode", "register", str(public), "local")
            except FederationError as error:
                if "already in use" not in str(error):  # as in a folder that is used again
                    raise
        return file

    def start_node(
        self, name: str, data: Path, *options: str, register: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start ``baffle node`` as a process, with a key of its own."""
        key = self.make_key(name, register=register and name not in self._starts)
        command = [sys.executable, "-m", "baffle", "node", "--superlink", self.address, "--data", str(data)]
        command += ["--name", name, "--key", str(key), *map(str, self._tls("--root-certificates")), *options]
        self._starts[name] = command
        self.nodes[name] = self.start_process(name, command, env)
        return self.nodes[name]

    def restart_node(self, name: str) -> subprocess.Popen[bytes]:
        """Start a client again with the same command and key."""
        self.nodes[name] = self.start_process(name, self._starts[name])
        return self.nodes[name]

    def flwr(self, *arguments: str) -> str:
        """Run ``flwr`` and return what it prints. Raises FederationError if it fails."""
        done = subprocess.run(
            [_BIN / "flwr", *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise FederationError(f"flwr {' '.join(arguments)}: {' '.join((done.stdout + done.stderr).split())[-500:]}")
        return done.stdout

    def submit(self, app: Path, **config: str | int | float | bool) -> int:
        """Start a run of an app and return its number. Raises FederationError."""
        values = [f"{name.replace('_', '-')}={msgspec.json.encode(value).decode()}" for name, value in config.items()]
        output = self.flwr("run", str(app), "local", "--format", "json", *(part for v in values for part in ("-c", v)))
        answer = msgspec.json.decode(output[output.index("{") :], type=dict[str, object])
        if "run-id" not in answer:  # flwr exits with 0 even then
            raise FederationError(f"flwr run: {answer.get('error-message', answer)}")
        return int(str(answer["run-id"]))

    def status(self, run: int) -> str:
        """Status of a run as Flower reports it: ``running``, ``finished:completed``."""
        return self.outcome(run)[0]

    def outcome(self, run: int) -> tuple[str, str]:
        """Status of a run, and the reason if it failed."""
        output = self.flwr("list", "--run-id", str(run), "local", "--format", "json")
        try:
            answer = msgspec.json.decode(output[output.index("{") :], type=_Runs)
        except (ValueError, msgspec.DecodeError) as error:  # flwr exits with 0 even if it fails
            raise FederationError(f"flwr list: {' '.join(output.split())[-300:]}") from error
        return answer.runs[0].status, answer.runs[0].status_details

    def server_apps(self) -> list[int]:
        """Process ids of the running ServerApps."""
        return [] if self.superexec is None else [p for p in _descendants(self.superexec.pid) if _is_server_app(p)]

    def close(self) -> None:
        """End all processes: by SIGTERM, and after some seconds by SIGKILL."""
        alive = [
            p for p in (*self.nodes.values(), self.superexec, self.superlink) if p is not None and p.poll() is None
        ]
        orphans = self.server_apps()
        for process in alive:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        deadline = time.monotonic() + 3
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_process(
        self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process of the federation; its output goes to ``NAME.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **(env or {})},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C goes to the process that started the federation only
            )

    def _tls(self, option: str) -> list[str | Path]:
        return [option, self.certificates] if self.certificates is not None else ["--insecure"]


class _RunStatus(msgspec.Struct, rename="kebab"):
    status: str
    status_details: str = ""


class _Runs(msgspec.Struct):
    runs: tuple[_RunStatus, ...]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    pids: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                pids += [child, *_descendants(child)]
    return pids


def _is_server_app(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False

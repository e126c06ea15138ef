"""A real Apache Kafka on loopback: assembled from Maven Central, formatted, started, killed and restarted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import string
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[2]
POM = ROOT / "ops" / "kafka" / "pom.xml"
PROPERTIES = ROOT / "ops" / "kafka" / "server.properties"
QUIET = ("-Xlog:disable", "-Xlog:all=error:stderr")
JVM = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", *QUIET)
"""Little memory and a fast start; a broker that is measured wants better."""


USER, PASSWORD = "adaptd", "correct horse"
"""Who may do everything."""
GUEST, GUEST_PASSWORD = "guest", "open sesame"
"""Who may do only what a test grants."""
KEY_PASSWORD = "speak friend"
"""What the key of the client's certificate is encrypted with."""

SECURE = """
listeners=PLAINTEXT://127.0.0.1:${port},SECURE://127.0.0.1:${secure_port},MUTUAL://127.0.0.1:${mutual_port},\
  FAR://127.0.0.1:${far_port},CONTROLLER://127.0.0.1:${controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:${port},SECURE://localhost:${secure_port},\
  MUTUAL://localhost:${mutual_port},FAR://127.0.0.1:${proxy_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,MUTUAL:SSL,FAR:PLAINTEXT,CONTROLLER:PLAINTEXT

authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:adaptd;User:CN=adaptd

sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.secure.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_${user}="${password}" user_${guest}="${guest_password}";
listener.name.secure.ssl.keystore.location=${home}/broker.p12
listener.name.secure.ssl.keystore.type=PKCS12
listener.name.secure.ssl.keystore.password=changeit
listener.name.mutual.ssl.keystore.location=${home}/broker.p12
listener.name.mutual.ssl.keystore.type=PKCS12
listener.name.mutual.ssl.keystore.password=changeit
listener.name.mutual.ssl.truststore.location=${home}/client.pem
listener.name.mutual.ssl.truststore.type=PEM
listener.name.mutual.ssl.client.auth=required

# Transactions that have expired are looked for twice a second, not every ten seconds.
transaction.abort.timed.out.transaction.cleanup.interval.ms=500
"""
"""Appended to the template, whose lines it overrides.

Beside the open listener, whose clients may do everything: one with TLS and passwords, one that asks for a client's
certificate, and one that says of itself that it is reached through a proxy.
"""


_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_GIVEN = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
"""From this port on the system gives ports to connections."""


class BrokerMissingError(Exception):
    """No broker can be had here; the message says what is missing."""


def kafka_version() -> str:
    """The version that `ops/kafka/pom.xml` pins."""
    found = ET.parse(POM).getroot().find(".//{*}kafka.version")
    assert found is not None
    assert found.text
    return found.text


def jars() -> Path:
    """A folder with the jars of Kafka: of `KAFKA_HOME`, of the cache, or fetched by Maven into the cache."""
    if shutil.which("java") is None:
        raise BrokerMissingError("no java on the PATH")
    if home := os.environ.get("KAFKA_HOME"):
        libs = Path(home) / "libs"
        if not any(libs.glob("kafka_*.jar")):
            raise BrokerMissingError(f"KAFKA_HOME={home} has no libs/kafka_*.jar")
        return libs
    cache = Path(os.environ.get("ADAPTD_CACHE") or Path.home() / ".cache" / "adaptd")
    libs = cache / f"kafka-{kafka_version()}" / "libs"
    if not libs.is_dir():
        fetch(libs)
    return libs


def fetch(libs: Path) -> None:
    """Let Maven copy the jars; they appear under their name at once, so that two runs cannot meet half a folder."""
    if shutil.which("mvn") is None:
        raise BrokerMissingError("no mvn on the PATH, and neither KAFKA_HOME nor ADAPTD_TEST_BOOTSTRAP is set")
    fresh = libs.with_name(f"libs-{uuid.uuid4().hex}")
    fresh.mkdir(parents=True)
    command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    done = subprocess.run(
        [*command, f"-DoutputDirectory={fresh}"], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode != 0:
        shutil.rmtree(fresh)
        raise BrokerMissingError(f"Maven could not fetch Kafka: {done.stdout.strip()[-300:]}")
    try:
        fresh.rename(libs)
    except OSError:  # another run was faster
        shutil.rmtree(fresh)


def run(command: list[str]) -> None:
    """Run one of Java's or Kafka's tools to its end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerMissingError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        raise BrokerMissingError(f"{' '.join(command[-6:])} failed: {done.stdout[-300:]}{done.stderr[-300:]}")


def certify_client(certificate: Path, key: Path, name: str) -> None:
    """Make a certificate that vouches for itself, and its key, encrypted with `KEY_PASSWORD`."""
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", f"/CN={name}"]
    run([*made, "-passout", f"pass:{KEY_PASSWORD}", "-keyout", str(key), "-out", str(certificate)])


_WORKERS = 8
_GIVEN = set[int]()


def free_port() -> int:
    """A port that is free and stays so while the broker is away: none that the system gives to connections.

    Where it may give all of them, any that is free. Each worker of the tests has its own, and gives none twice:
    some are listened on much later.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    while True:
        port = random.randrange(10_000 + worker, _FIRST_GIVEN, _WORKERS) if _FIRST_GIVEN > 12_000 else 0
        if port in _GIVEN:
            continue
        _GIVEN.update({port} - {0})
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])


class Node:
    """One KRaft node in a folder of its own; the same ports and data over every restart."""

    def __init__(self, libs: Path, home: Path, jvm: Sequence[str] = JVM) -> None:
        self.home = home
        self.port = free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self.secure_port, self.mutual_port = free_port(), free_port()
        self.far_port, self.proxy_port = free_port(), free_port()
        """Where the listener behind the proxy is, and where it says that it is."""
        self.authority = home / "broker.pem"
        """The certificate of the listeners with TLS; it names localhost, not 127.0.0.1."""
        self.certificate, self.key = home / "client.pem", home / "client.key"
        """What a client shows to the listener that asks for it; the key is encrypted with `KEY_PASSWORD`."""
        self._java = ["java", *jvm, "-cp", f"{libs}/*"]
        self._config = home / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None

    def format(self) -> None:
        """Write the certificate, the configuration and the empty storage."""
        self._certify()
        certify_client(self.certificate, self.key, "adaptd")
        filled = string.Template(PROPERTIES.read_text() + SECURE).substitute(
            port=self.port,
            secure_port=self.secure_port,
            mutual_port=self.mutual_port,
            far_port=self.far_port,
            proxy_port=self.proxy_port,
            user=USER,
            password=PASSWORD,
            guest=GUEST,
            guest_password=GUEST_PASSWORD,
            controller_port=free_port(),
            data=self.home / "data",
            home=self.home,
        )
        self._config.write_text(filled)
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = [*self._java, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", str(self._config)]
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
            for user, password in ((USER, PASSWORD), (GUEST, GUEST_PASSWORD)):
                tool += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
        run(tool)

    def _certify(self) -> None:
        store = ["-keystore", str(self.home / "broker.p12"), "-storetype", "PKCS12", "-storepass", "changeit"]
        name = ["-alias", "broker", "-dname", "CN=localhost", "-ext", "san=dns:localhost", "-validity", "2"]
        run(["keytool", "-genkeypair", "-keyalg", "EC", *name, *store])
        run(["keytool", "-exportcert", "-rfc", "-alias", "broker", "-file", str(self.authority), *store])

    def start(self, timeout: float = 120.0) -> None:
        """Start and wait until the port answers."""
        with (self.home / "broker.log").open("ab") as log:
            self._process = subprocess.Popen([*self._java, "kafka.Kafka", str(self._config)], stdout=log, stderr=log)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        tail = (self.home / "broker.log").read_text(errors="replace")[-600:]
        self.stop()
        raise BrokerMissingError(f"Kafka did not start within {timeout:g} s: {tail}")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP, until the end SIGCONT: connections stay open and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: no goodbye to anybody."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that takes too long."""
        self._end(signal.SIGTERM)

    def _end(self, sign: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(sign)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

"""Ray Serve around the ASGI application: replicas that die, that are replaced, and that can't hold every bundle."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import cascade
from cascade.engine.engine import Engine
from cascade.engine.results import ItemError, Prediction
from handlers.ray.serve import NAME, QUIET, serving
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.conftest import need
from tests.helpers.otlp import CALLER, TRACEPARENT, Collector, receiving
from tests.helpers.paths import ROOT
from tests.helpers.servers import EXECUTOR
from tests.helpers.torments import settled

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # in Ray
]
BUNDLES = ("a", "b", "c", "d")
HELD = 2
KEY, OF_A = "opens everything", "opens a alone"


@pytest.fixture(scope="module")
def many(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of four bundles."""
    store = tmp_path_factory.mktemp("many")
    for name in BUNDLES:
        shutil.copytree(bundle_path, store / name / "1")
    return store


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    """What the replicas export."""
    with receiving() as collector:
        yield collector


@pytest.fixture(scope="module")
def url(many: Path, traces: Collector) -> Iterator[str]:
    """Two replicas with all bundles."""
    need(find_spec("ray"), "Ray is not installed")
    (port,) = claim_ports((LOOPBACK, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_EXECUTOR", EXECUTOR)
        for name, value in traces.environment.items():
            patch.setenv(name, value)
        patch.setenv("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")  # ten otherwise
        options: dict[str, Any] = {"log_level": "warning", "poll": 0, "threads": 1, "no_auth": True}
        with serving(many, port=port, replicas=3, least=2, **options) as url:
            yield url
    assert not replicas()


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that live."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p.is_running() and any("ServeReplica" in part for part in _command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@contextmanager
def load(url: str, photo: bytes, threads: int = 4, bundles: Sequence[str] = BUNDLES) -> Iterator[Counter[Any]]:
    """Requests without pause while the block runs, for each of the bundles; gives what became of them, by status."""
    found: Counter[Any] = Counter()
    over = threading.Event()

    def send(number: int) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            nth = number
            while not over.is_set():
                nth += 1
                headers = {"X-Cascade-Bundle": bundles[nth % len(bundles)], "Content-Type": "image/png"}
                headers["Authorization"] = f"Bearer {KEY}"  # for when there are keys
                try:
                    answer = client.post(f"{url}/v1/predict", content=photo, headers=headers)
                    found[answer.status_code] += 1
                    if answer.status_code != 200 and not answer.content.startswith(b'{"error":'):
                        found[f"{answer.status_code} {answer.headers} {answer.text}"] += 1
                except Exception as error:
                    found[repr(error)] += 1

    running = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield found
    finally:
        over.set()
        for thread in running:
            thread.join()


def test_the_same_answers_as_the_engine(url: str, engine: Engine, photos: list[bytes]) -> None:
    want = engine.predict(photos, cascade.Options(embedding=True))
    with cascade.Client(url) as client:
        assert client.models() == {name: ["1"] for name in BUNDLES}
        columns = client.infer(photos, "a")
        for photo, expected in zip(photos, want, strict=True):
            answer = client.predict(photo, cascade.Options("b", embedding=True))
            assert isinstance(answer, Prediction) and isinstance(expected, Prediction)
            assert answer.cluster == expected.cluster
            assert answer.embedding == pytest.approx(expected.embedding, abs=1e-4)
    assert columns["cluster"].tolist() == [p.cluster for p in want if isinstance(p, Prediction)]


def test_limits_and_errors_are_those_of_the_application(url: str, photos: list[bytes]) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        unknown = client.post("/v1/predict", content=photos[0], headers={"X-Cascade-Bundle": "z"})
        assert (unknown.status_code, unknown.json()["error"]["kind"]) == (404, "unknown_bundle")
        bad = client.post("/v1/predict", content=b"no image", headers={"X-Cascade-Bundle": "a"})
        assert (bad.status_code, bad.json()["error"]["kind"]) == (400, "not_an_image")
        large = client.post("/v1/predict", content=bytes(65 * 2**20), headers={"X-Cascade-Bundle": "a"})
        assert (large.status_code, large.json()["error"]["kind"]) == (413, "body_too_large")
        assert len(large.headers.get_list("x-request-id")) == 1
        assert client.get("/v2/health/ready").status_code == 200


def test_a_request_is_in_the_trace_of_its_caller(url: str, traces: Collector, photos: list[bytes]) -> None:
    headers = {"X-Cascade-Bundle": "a", "traceparent": TRACEPARENT}
    httpx.post(f"{url}/v1/predict", content=photos[0], headers=headers, trust_env=False).raise_for_status()
    assert settled(lambda: "POST /v1/predict" in traces.spans(), 30)
    spans = traces.spans()
    assert {"decode", "queue", "pass", "swap"} <= spans.keys()
    assert spans["POST /v1/predict"].parent_span_id.hex() == CALLER


def test_metrics_are_those_of_all_replicas(url: str) -> None:
    def backbones() -> float:
        text = httpx.get(f"{url}/metrics", trust_env=False, timeout=60).text
        (line,) = (line for line in text.splitlines() if line.startswith("cascade_backbones "))
        return float(line.split()[1])

    assert settled(lambda: backbones() == len(replicas()) >= 2, 120), "a third one may just come or go"


def test_a_replica_dies_under_load(url: str, photos: list[bytes]) -> None:
    """What it was at is answered with 503 and a word; whoever asks again gets an answer."""
    assert settled(lambda: len(replicas()) >= 2, 120)
    with load(url, photos[0]) as found:
        assert settled(lambda: found[200] > 20, 120)
        before = {p.pid for p in replicas()}
        os.kill(min(before), signal.SIGKILL)
        with cascade.Client(url, patience=120) as client:
            for photo in photos:
                assert isinstance(client.predict(photo, cascade.Options("a")), Prediction)
        assert settled(lambda: {p.pid for p in replicas()} - before, 120), "no other one took its place"
    assert set(found) <= {200, 503}
    assert found[503] <= 8 and found[200] > 20, found


@pytest.fixture(scope="module")
def roll_out(many: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Give the replicas another configuration: keys, memory for two of the four bundles, and as many as said."""
    from ray import serve

    from handlers.ray.replica import DEPLOYMENT, Settings

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"* {sha256(KEY.encode()).hexdigest()}\na {sha256(OF_A.encode()).hexdigest()}\n")
    stats = engine.stats()
    settings = Settings(
        model_store=str(many),
        on_demand=True,
        memory_bytes=stats["backbone_bytes"] + int((HELD + 0.5) * stats["packed_bytes"]),
        api_keys=str(keys),
        log_level="warning",
        poll=0,
        threads=1,
    )
    environment = {
        "env_vars": {"CASCADE_EXECUTOR": EXECUTOR, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}
    }

    def run(**number: Any) -> None:
        small = DEPLOYMENT.options(ray_actor_options={"runtime_env": environment}, **number)
        serve.run(small.bind(settings), name=NAME, logging_config=QUIET)

    return run


def test_a_new_configuration_rolls_out_without_a_failed_request(
    url: str, roll_out: Callable[..., None], photos: list[bytes]
) -> None:
    with load(url, photos[0], threads=2) as found:
        before = {p.pid for p in replicas()}
        roll_out(num_replicas=2, autoscaling_config=None)
        assert settled(lambda: not before & {p.pid for p in replicas()}, 240)
        so_far = found[200]
        assert settled(lambda: found[200] > so_far + 40, 120)
    assert set(found) == {200}, found


def test_bundles_that_do_not_fit_come_when_they_are_asked_for(url: str, photos: list[bytes]) -> None:
    """Four bundles on two replicas that hold two each: a request goes where its bundle is, so hardly any is loaded."""
    with cascade.Client(url, key=KEY, patience=120) as client:
        assert client.models() == {name: ["1"] for name in BUNDLES}
        assert isinstance(client.predict(photos[0], cascade.Options("z")), ItemError)
        for _ in range(8):  # until every bundle has its place
            before = loads(url)
            for name in BUNDLES:
                assert isinstance(client.predict(photos[0], cascade.Options(name)), Prediction)
            time.sleep(1.5)  # replicas tell the proxies once a second what they hold
            if loads(url) == before:
                break
        assert before >= len(BUNDLES)
        for nth in range(40):
            answer = client.predict(photos[nth % 10], cascade.Options(BUNDLES[nth % 4]))
            assert isinstance(answer, Prediction) and answer.bundle == BUNDLES[nth % 4]
        print(before, loads(url))
        assert loads(url) - before <= 8  # half of the 40 would meet a replica without their bundle


def loads(url: str) -> float:
    """How often the replicas loaded a bundle."""
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{url}/metrics", headers=headers, trust_env=False, timeout=60).raise_for_status()
    lines = answer.text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("cascade_bundle_loads_total "))


def test_a_key_opens_its_bundles_alone(url: str, photos: list[bytes]) -> None:
    """And who has none for a bundle has none driven out for it."""
    before = loads(url)
    with httpx.Client(trust_env=False, timeout=60) as client:

        def ask(bundle: str, key: str | None) -> tuple[int, str | None]:
            headers = {"X-Cascade-Bundle": bundle} | ({} if key is None else {"Authorization": f"Bearer {key}"})
            answer = client.post(f"{url}/v1/predict", content=photos[0], headers=headers).json()
            return answer["error"]["status"] if "error" in answer else 200, answer.get("error", {}).get("kind")

        for bundle in BUNDLES:
            assert ask(bundle, None) == (401, "key_missing")
            assert ask(bundle, "guessed") == (401, "key_unknown")
        assert [ask(bundle, OF_A) for bundle in BUNDLES[1:]] == [(403, "key_forbidden")] * 3
        assert loads(url) == before
        assert ask("a", OF_A) == ask("a", KEY) == ask("b", KEY) == (200, None)
    with cascade.Client(url, key=OF_A) as narrow:
        assert narrow.models() == {"a": ["1"]}


@pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")  # it is still checked
@pytest.mark.soak
def test_replicas_come_and_go_with_the_load(url: str, roll_out: Callable[..., None], photos: list[bytes]) -> None:
    """From one to two and back by the requests in progress, none of which fails."""
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.5}
    roll_out(autoscaling_config=scaling | delays)
    with load(url, photos[0], threads=1, bundles=("a",)) as calm:
        assert settled(lambda: len(replicas()) == 1, 120), "nothing to do for the second one"
        with load(url, photos[0], threads=12, bundles=("a",)) as busy:
            assert settled(lambda: len(replicas()) == 2, 120), "12 in progress are more than 4 for each"
            first = busy[200]
            assert settled(lambda: busy[200] > first + 100, 120)
        assert settled(lambda: len(replicas()) == 1, 120), "nothing to do again"
    assert set(calm) == set(busy) == {200}, (calm, busy)


@pytest.mark.soak
def test_the_command_ends_in_order(many: Path, photos: list[bytes]) -> None:
    """Beside the server of this module it would take too long for every run."""
    (port,) = claim_ports((LOOPBACK, 0))
    command = [sys.executable, "-m", "cascade.cli.main", "serve", "--frontend", "ray", "--model-store", str(many)]
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))  # short: Ray's sockets lie in it
    environment = os.environ | {"CASCADE_EXECUTOR": EXECUTOR, "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith(b"ready")
        with cascade.Client(f"http://{LOOPBACK}:{port}") as client:
            assert isinstance(client.predict(photos[0], cascade.Options("a")), Prediction)
        rebound = httpx.get(f"http://{LOOPBACK}:{port}/v2", headers={"Host": "evil.example"}, trust_env=False)
        assert (rebound.status_code, rebound.json()["error"].partition(":")[0]) == (421, "unknown_host")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert settled(lambda: not any(child.is_running() for child in children), 60)
        assert not list(folder.iterdir())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder)

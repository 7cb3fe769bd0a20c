"""recipes/cluster: the command of each launcher, taken out of its file, trains with two ranks of this machine's CPU.

srun, scontrol and Modal's client are stood in for. What the launchers' own tools say of the files is checked where the
tools are installed. `docs/cluster.md` says what else was tried.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from st_fast.core.checkpoint import store
from tests import tiny
from tests.faults.ranks import ONE_THREAD, TORCHRUN, logged, wait_for

yaml = pytest.importorskip("yaml")

FOLDER = tiny.ROOT / "recipes" / "cluster"
STEPS = 60
SRUN = """#!/bin/bash
# srun of two nodes that are this machine: the command once a node, and the worst of their exit codes
echo "$@" >> "$STAND_IN/srun"
while [[ $1 == --* ]]; do shift; done
"$@" & one=$!
"$@" & two=$!
echo "$one $two" > "$STAND_IN/pids"
code=0
wait $one || code=$?
wait $two || code=$?
exit $code
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "show job") cat "$STAND_IN/job" ;;
    *) echo "$@" >> "$STAND_IN/scontrol" ;;
esac
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the nodes share: latents, and a recipe of one stage."""
    folder = tmp_path_factory.mktemp("disk")
    recipe = tiny.write_recipe(folder / "tiny.toml", tiny.write_data(folder / "latents"), folder / "elsewhere")
    text = recipe.read_text().split("[[stage]]")
    recipe.write_text(f"{text[0]}[[stage]]{text[1].replace('steps = 10', f'steps = {STEPS}')}")
    return folder


@pytest.fixture(scope="module")
def whole(shared: Path) -> Path:
    """The run folder of a training that nothing interrupted: PyTorchJob's command, as its pod runs it."""
    words, environment = pod(here(shared, "whole"))
    done = subprocess.run(words, env=environment, cwd=tiny.ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return shared / "runs" / "whole"


def here(shared: Path, run: str) -> Callable[[str], str]:
    """Turns the paths of a launcher's file into those of this machine: the shared folder, the recipe and the run."""
    places = {"/shared/runs/main": f"{shared}/runs/{run}", "/shared": str(shared)}
    recipe = {"recipes/sit_xl.toml": str(shared / "tiny.toml")}

    def turn(text: str) -> str:
        for place, own in (places | recipe).items():
            text = text.replace(place, own)
        return text

    return turn


def free_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Of a node: torchrun on the PATH, one thread, and nothing of another launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM", "SKYPILOT"))}
    path = f"{TORCHRUN.parent}{os.pathsep}{kept['PATH']}"
    return kept | ONE_THREAD | {"PATH": path, "PYTHONPATH": str(tiny.ROOT)} | more


def pod(turn: Callable[[str], str]) -> tuple[list[str], dict[str, str]]:
    """The command of PyTorchJob's pod and its environment, with the variables that the operator adds for one node."""
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())["spec"]
    elastic, (container,) = job["elasticPolicy"], job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    added = {
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_RDZV_CONF": ",".join(f"{pair['key']}={pair['value']}" for pair in elastic["rdzvConf"]),
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_NNODES": "1:1",
        "PET_NPROC_PER_NODE": "2",
    }
    own = {pair["name"]: pair["value"] for pair in container["env"]}
    return [turn(word) for word in container["command"]], environment(**own, **added) | ONE_THREAD


def assert_same(run: Path, other: Path) -> None:
    """Both have trained all steps, and to the same bits."""
    one, two = (store.load(folder / "align" / "checkpoints" / f"{STEPS:08d}") for folder in (run, other))
    assert one.groups.keys() == two.groups.keys() >= {"model", "ema", "optim"}
    for name, group in one.groups.items():
        assert group.keys() == two.groups[name].keys()
        assert all(torch.equal(tensor, two.groups[name][key]) for key, tensor in group.items()), name


class Slurm:
    """The script under a stand-in of srun and scontrol: two nodes with a rank each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / "bin" / name).parent.mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "job").write_text("   PreemptEligibleTime=2026-12-01T13:03:00 PreemptTime=None\n")

    def start(self, *words: str) -> subprocess.Popen[str]:
        whole = environment(
            STAND_IN=str(self.folder), SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2",
            SLURM_GPUS_ON_NODE="1", SLURM_CPUS_PER_TASK="4", RENDEZVOUS_PORT=free_port(), TMPDIR=str(self.folder),
        )  # fmt: skip
        whole["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{whole['PATH']}"
        return subprocess.Popen(
            ["bash", str(FOLDER / "slurm.sh"), *words], env=whole, cwd=tiny.ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        printed = process.communicate(timeout=180)[0]
        return process.returncode, printed

    @property
    def requeued(self) -> str:
        path = self.folder / "scontrol"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_slurm_a_job_told_to_end_saves_is_queued_again_and_ends_equal_to_the_bit(slurm: Slurm, shared, whole):
    out = shared / "runs" / "slurm"
    words = (str(shared / "tiny.toml"), f"--run.out={out}")
    process = slurm.start(*words)
    wait_for(lambda: logged(out, "train") > 2)
    for pid in (slurm.folder / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and slurm.requeued == "requeue 7\n", printed
    assert 2 < logged(out, "train") < STEPS
    code, printed = slurm.run(*words)
    assert (code, slurm.requeued) == (0, "requeue 7\n"), printed
    assert_same(out, whole)
    first, second = (slurm.folder / "srun").read_text().splitlines()
    assert "--cpus-per-task=4 torchrun --nnodes=2 --nproc-per-node=1" in first and "--rdzv-id=7" in second
    assert not list(slurm.folder.glob("tmp.*"))


@pytest.mark.parametrize(
    ("said", "code", "requeued"),
    [
        ("SIGTERM: saved; the same command continues", 1, "requeue 7\n"),
        ("align: loss is not finite", 1, ""),
        ("SIGTERM came too late, all is done; the same command continues", 0, ""),
    ],
)
def test_slurm_only_an_interruption_is_queued_again(slurm: Slurm, said: str, code: int, requeued: str):
    torchrun = slurm.folder / "bin" / "torchrun"
    torchrun.write_text(f"#!/bin/bash\necho 'st_fast: {said}' >&2\nexit {code}\n")
    torchrun.chmod(0o755)
    ended, printed = slurm.run("any.toml")
    assert (ended, slurm.requeued) == (code, requeued) and printed.count(said) == 2


def test_slurm_a_job_preempted_before_it_said_anything_is_queued_again(slurm: Slurm):
    (slurm.folder / "job").write_text("   PreemptEligibleTime=2026-12-01T13:03:00 PreemptTime=2026-12-01T13:04:00\n")
    torchrun = slurm.folder / "bin" / "torchrun"
    torchrun.write_text("#!/bin/bash\nkill -TERM $$\n")
    torchrun.chmod(0o755)
    assert slurm.run("any.toml")[0] == 143 and slurm.requeued == "requeue 7\n"


def test_skypilots_script_trains_and_lets_skypilot_wait_for_uploads(shared, whole, tmp_path):
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "torchrun").symlink_to(TORCHRUN)
    given = {name: here(shared, "main")(value) for name, value in task["envs"].items()}
    assert given["SHARED"] == str(shared) and set(task["file_mounts"]) == {"/shared"}
    script = task["run"].replace(":29400", f":{free_port()}")
    node = {"NODE_IPS": "127.0.0.1\n", "NUM_NODES": "1", "NUM_GPUS_PER_NODE": "2", "TASK_ID": "sky-1_st-fast_1-0"}
    done = subprocess.run(
        ["bash", "-c", f"{script}\necho uploads: $?"], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env=environment(**given, **{f"SKYPILOT_{name}": value for name, value in node.items()}),
    )  # fmt: skip
    assert done.stdout.endswith("uploads: 0\n"), done.stderr
    assert_same(shared / "runs" / "main", whole)


class Volume(SimpleNamespace):
    commits = 0

    def commit(self) -> None:
        self.commits += 1


@contextmanager
def modal_app(modal: object) -> Iterator[ModuleType]:
    """The file as a module, with this as the package `modal`."""
    before = sys.modules.get("modal")
    sys.modules["modal"] = modal  # type: ignore[assignment]
    try:
        spec = importlib.util.spec_from_file_location("modal_app", FOLDER / "modal_app.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop("modal")
        if before is not None:
            sys.modules["modal"] = before


class Image:
    """Takes any layer."""

    def __getattr__(self, name: str) -> Callable[..., Image]:
        return lambda *arguments, **options: self


def stand_in() -> SimpleNamespace:
    """As much of the package `modal` as the file needs, with functions that run here."""
    app = SimpleNamespace(function=lambda **options: lambda call: call, local_entrypoint=lambda: lambda call: call)
    volume = Volume()
    return SimpleNamespace(
        App=lambda name: app, Image=Image(), Retries=dict,
        Volume=SimpleNamespace(from_name=lambda name, create_if_missing: volume),
    )  # fmt: skip


def test_modals_function_saves_when_its_container_is_taken_away(shared, monkeypatch):
    out = shared / "runs" / "main_modal"
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def interrupt() -> None:
        wait_for(lambda: logged(out, "train") > 2)
        os.kill(os.getpid(), signal.SIGINT)

    with modal_app(stand_in()) as module:
        monkeypatch.setattr(module, "SHARED", str(shared))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                module.train(str(shared / "tiny.toml"), f"--run.out={shlex.quote(str(out))}", gpus=2)
        finally:
            thread.join()
            signal.signal(signal.SIGINT, before)
        assert module.volume.commits == 1
    steps = [record["step"] for record in tiny.records(out, "save")]
    assert steps and 2 < steps[-1] < STEPS and store.valid(out / "align" / "checkpoints" / f"{steps[-1]:08d}") is None


@pytest.mark.parametrize("code", [0, 1])
def test_modal_is_told_of_a_failure_and_keeps_what_was_written(code: int, monkeypatch):
    with modal_app(stand_in()) as module:
        monkeypatch.setattr(module, "command", lambda *arguments: [sys.executable, "-c", f"raise SystemExit({code})"])
        if code:
            with pytest.raises(RuntimeError, match="torchrun ended with 1"):
                module.train("any.toml")
        else:
            module.train("any.toml")
        assert module.volume.commits == 1


def test_modals_own_package_takes_the_file(monkeypatch):
    modal = pytest.importorskip("modal")
    monkeypatch.chdir(tiny.ROOT)
    with modal_app(modal) as module:
        assert isinstance(module.train, modal.Function) and module.app.name == "st-fast"


def test_skypilots_own_package_takes_the_file(monkeypatch):
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(tiny.ROOT)
    task = sky.Task.from_yaml(str(FOLDER / "skypilot.yaml"))
    (resources,) = task.resources
    assert resources.use_spot and resources.accelerators == {"H200": 8} and set(task.storage_mounts) == {"/shared"}


def test_the_operators_own_models_read_all_of_the_job():
    models = pytest.importorskip("kubeflow.training").models
    client = pytest.importorskip("kubernetes.client")
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    for name in dir(models):
        if not hasattr(client.models, name):
            setattr(client.models, name, getattr(models, name))
    api = client.ApiClient()
    read = api.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    assert api.sanitize_for_serialization(read) == job

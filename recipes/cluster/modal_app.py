"""Modal: one container with 8 GPUs. A volume holds the latents and the run folder.

    modal volume put st-fast data/imagenet256 latents
    modal run --detach recipes/cluster/modal_app.py --recipe recipes/sit_xl.toml --options "--optim.batch_size=512"

Run it in the root of this repository. Modal interrupts a container that it takes away, kills it 30 seconds later, and
calls `train` again with the same arguments, as it does after an error. A call also stops by itself before its time is
over. All ranks then save at the same step, and the next call continues there.
"""

import shlex
import signal
import subprocess

import modal

GPUS = 8
SHARED = "/shared"
HOURS = 24
"""Modal's limit of one call."""
TO_SAVE = 600
"""Seconds before that at which the ranks are asked to save."""

app = modal.App("st-fast")
volume = modal.Volume.from_name("st-fast", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("g++")  # for csrc
    .add_local_dir(".", "/opt/st_fast", copy=True, ignore=[".git", ".venv", "build", "data", "runs"])
    .workdir("/opt/st_fast")
    .run_commands("pip install -c constraints.txt -e '.[data,vae]'")
)


def command(recipe: str, options: str, gpus: int) -> list[str]:
    """The command that trains; `options` are overrides of the recipe as in a shell."""
    return [
        "torchrun", "--standalone", f"--nproc-per-node={gpus}", "-m", "st_fast.train", recipe,
        f"--data.path={SHARED}/latents", f"--run.out={SHARED}/runs/main", *shlex.split(options),
    ]  # fmt: skip


@app.function(
    image=image,
    gpu=f"H200:{GPUS}",
    volumes={SHARED: volume},
    timeout=HOURS * 3600,
    retries=modal.Retries(max_retries=10, backoff_coefficient=1.0, initial_delay=1.0),
    single_use_containers=True,
)
def train(recipe: str, options: str = "", gpus: int = GPUS) -> None:
    """Trains a recipe to its end, or raises once the ranks have saved; then Modal calls it again."""
    ranks = subprocess.Popen(command(recipe, options, gpus))
    try:
        code = ranks.wait(HOURS * 3600 - TO_SAVE)
    except BaseException:  # KeyboardInterrupt: the container is taken away; TimeoutExpired: the time is nearly over
        ranks.send_signal(signal.SIGTERM)
        ranks.wait()
        raise
    finally:
        volume.commit()
    if code:
        raise RuntimeError(f"torchrun ended with {code}; its report above has the ranks' exit codes")


@app.local_entrypoint()
def main(recipe: str = "recipes/sit_xl.toml", options: str = "") -> None:
    """`modal run`: calls `train` in the cloud and waits for it."""
    train.remote(recipe, options)

"""The job files of recipes/SLURM.md, on a machine without SLURM: saved at a signal, queued again, and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from process import environment
from tiny import recipe_text

PAGE = Path(__file__).parent.parent / "recipes" / "SLURM.md"
ONE_NODE, NODES = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

# Stand-ins: a program that writes down what it was asked for, and one that starts the tasks of a step.
SCONTROL = '#!/bin/bash\necho "$@" >> asked\n[ "$1" = requeue ] || echo 127.0.0.1\n'
SRUN = """#!/bin/bash
shift
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks="$tasks $!"; done
echo $tasks > tasks
highest=0
for task in $tasks; do wait $task; code=$?; [ $code -gt $highest ] && highest=$code; done
exit $highest
"""


def submit(folder: Path, job: str) -> subprocess.Popen[bytes]:
    """Start a job file as SLURM would, on the CPU and with a small recipe."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    here = f"#!/bin/bash\nexec {sys.executable} -m "
    stand_ins = {"scontrol": SCONTROL, "srun": SRUN}
    stand_ins |= {"torchrun": f'{here}torch.distributed.run "$@"\n', "cfamc": f'{here}cfamc_cli "$@"\n'}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / "small.toml").write_text(recipe_text(epochs=4.0, every=2, log_every=2))
    text = job.replace("cifar10", "small.toml").replace("--device cuda", "--device cpu")
    (folder / "job.sh").write_text(text)
    facts = {"JOB_ID": "7", "ARRAY_TASK_ID": "3", "GPUS_ON_NODE": "2", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    variables = {f"SLURM_{key}": value for key, value in facts.items()} | {"SLURM_JOB_NODELIST": "here"}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=folder,
            env=environment(PATH=path, PYTHONWARNINGS="default", GLOO_SOCKET_IFNAME="lo", **variables),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


@pytest.mark.parametrize("job", [ONE_NODE, NODES], ids=["one node", "nodes"])
def test_a_job_file_is_a_shell_script(job: str) -> None:
    assert job.startswith("#!/bin/bash\n#SBATCH --job-name=cfamc\n")
    done = subprocess.run(["bash", "-n"], input=job.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("job", [ONE_NODE, NODES], ids=["one node", "nodes"])
def test_a_job_saves_at_its_signal_is_queued_again_and_goes_on(job: str, tmp_path: Path) -> None:
    def said() -> str:
        return (tmp_path / "said").read_text(errors="replace")

    started = submit(tmp_path, job)
    try:
        limit = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/*/checkpoints/step-*/manifest.json")):
            assert started.poll() is None, said()
            assert time.monotonic() < limit, said()
            time.sleep(0.02)
        told = [started.pid] if "B:USR1" in job else [int(pid) for pid in (tmp_path / "tasks").read_text().split()]
        for pid in told:
            os.kill(pid, signal.SIGUSR1)
        code = started.wait(60)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert code == (1 if job == ONE_NODE else 138), said()  # torchrun has one code for all that fails
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 7"
    (record,) = tmp_path.glob("runs/*/*/run.json")
    cut = json.loads(record.read_text())
    assert cut["status"] == "interrupted", said()
    assert (record.parent / "checkpoints" / f"step-{cut['progress']['step']:08d}" / "manifest.json").exists()

    (tmp_path / "asked").unlink()
    assert submit(tmp_path, job).wait(180) == 0, said()
    finished = json.loads(record.read_text())
    assert (finished["id"], finished["status"]) == (cut["id"], "finished")
    assert finished["seed"] == (3 if job == ONE_NODE else 0)
    lines = [json.loads(line) for line in (record.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6, finished["progress"]["total"] + 1, 6))
    assert not (tmp_path / "asked").exists() or "requeue" not in (tmp_path / "asked").read_text()

"""Two processes that share a batch compute what one process computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_recipe

from cfamc_cli.engine.distributed import World
from cfamc_cli.errors import CfamcError, ExitCode

_RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from fixed_inputs import uniform
from tiny import tiny_recipe
from cfamc_cli.engine import distributed
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.sink import NullLedger, NullTalk

images = ImageSet(
    images=(uniform(32, 3, 12, 12, key="ranks") * 256).to(torch.uint8), labels=torch.arange(32) % 4,
    classes=("a", "b", "c", "d"), dataset="folder", split="train", fingerprint="0" * 64, licence="",
)
world = distributed.join(torch.device("cpu"))
found = {}
for objective, adversary in (("emp-ssl", "free"), ("simclr", "free"), ("supcon", "pgd"), ("emp-ssl", "none")):
    recipe = tiny_recipe(objective, adversary, train={"epochs": 0.5}, optimizer={"lr": 0.05})
    trainer = Trainer(recipe, images, device=torch.device("cpu"), world=world, talk=NullTalk(), ledger=NullLedger())
    for part in trainer.encoder.modules():  # batch norm is per rank: frozen, it is the same for all
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.train = lambda mode=True: part
            torch.nn.Module.eval(part), setattr(part, "training", False)
    trainer.encoder.train = lambda mode=True: trainer.encoder
    losses, add = [], trainer.journal.add
    def note(terms, norm, *, lr):
        losses.append([terms.loss.item(), norm.item()])
        add(terms, norm, lr=lr)
    trainer.journal.add = note
    trainer.save = lambda folder: None
    trainer.train(None, stop=lambda: 0)
    delta = distributed.gather_images(trainer.adversary.delta, world)
    found[f"{objective} {adversary}"] = {
        "losses": losses,
        "weights": [float(p.detach().double().norm()) for p in trainer.encoder.parameters()],
        "delta": [float(part.double().abs().mean()) for part in delta],
    }
flags = [distributed.largest(5 * world.rank, world)]
if world.leads:
    print(json.dumps({"flags": flags, "size": world.size, "found": found}))
distributed.leave(world)
"""


def run(ranks: int) -> dict[str, object]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    started = []
    for rank in range(ranks):
        named = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in named.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _RANK, str(Path(__file__).parent)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    found: dict[str, object] = json.loads(outputs[0].splitlines()[-1])
    return found


def flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    assert isinstance(value, float)
    return [value]


@pytest.mark.slow
def test_two_gloo_ranks_equal_one_process_with_frozen_batch_norm() -> None:
    one, two = run(1), run(2)
    assert (one["size"], two["size"]) == (1, 2)
    assert (one["flags"], two["flags"]) == ([0], [5])
    assert flat(two["found"]) == pytest.approx(flat(one["found"]), rel=2e-3, abs=1e-6)


def test_ranks_share_a_batch_without_overlap() -> None:
    shares = [World(rank, 4).share(12) for rank in range(4)]
    assert [index for share in shares for index in range(12)[share]] == list(range(12))
    with pytest.raises(CfamcError, match="12 images do not divide among 5 processes") as caught:
        tiny_recipe(train={"batch_size": 12}).require_fit(64, processes=5)
    assert caught.value.exit_code == ExitCode.INVALID
    assert caught.value.hint == "set train.batch_size to a multiple of 5"

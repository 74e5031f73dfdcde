"""Asks one peer, inside the peer's own virtual environment; nothing of galore-mem is imported here.

    python ask.py PEER < questions.json > answers.json

A question has `model` (a name on the Hub), `config`, `parameters`, `adapters`, `gpu` and `settings`. An answer has
`allocated_bytes` (its figure for what tensors take at the peak) and `whole_bytes` (all that it counts, with context and
fragmentation), or what the peer said when it `refused`, or how it `failed`.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from typing import Any

MIB, GIB = 2**20, 2**30
ANY_CARD = 80 * 1024  # MiB, where the card is not known: it decides nothing of the figure


def vramcalc(asked: dict[str, Any]) -> dict[str, int]:
    said = import_module("vramcalc").estimate(asked["config"], **asked["settings"])
    return {"allocated_bytes": said.total, "whole_bytes": said.total + said.overhead}


def fitcheck(asked: dict[str, Any]) -> dict[str, int]:
    peer, parser = import_module("fitcheck"), import_module("fitcheck.config_parser")
    config = peer.fetch_model_config(asked["model"])
    # online it takes the Hub's number of parameters, and refuses where its own formula is more than 2 % off
    count = parser._reconcile_param_count(asked["model"], asked["parameters"], config.num_params)
    card = peer.get_gpu(asked["gpu"]) if asked["gpu"] else peer.get_gpu(vram_mib=ANY_CARD)
    said = peer.estimate(replace(config, num_params=count), peer.TrainingConfig(**asked["settings"]), card)
    tensors = said.total_mib - said.overhead_mib
    return {"allocated_bytes": round(tensors * MIB), "whole_bytes": round(said.total_mib * MIB)}


def torch_preflight(asked: dict[str, Any]) -> dict[str, int]:
    peer = import_module("torch_preflight.vram")
    settings = dict(asked["settings"])
    settings["precision"] = peer.PrecisionMode(settings["precision"])
    settings["optimizer"] = peer.OptimizerKind(settings["optimizer"])
    config = peer.RunConfig(**settings)
    profile = peer.resolve_profile(asked["model"], allow_network=True, config=config)
    if not profile.resolved:
        raise ValueError(profile.reason)
    count, adapters = asked["parameters"], asked["adapters"]
    profile = replace(profile, param_count=count + adapters, trainable_params=adapters or count)
    said = peer.estimate_config(profile, config, gpu=asked["gpu"])
    beside = said.breakdown.cuda_context + said.breakdown.fragmentation
    return {"allocated_bytes": said.total - beside, "whole_bytes": said.total}


def ftuneai(asked: dict[str, Any]) -> dict[str, int]:
    peer, loader = import_module("ftuneai"), import_module("ftuneai.loader")
    hub: Any = import_module("ftuneai.hub")
    settings = dict(asked["settings"])
    hub.fetch_model_config = lambda name: {**asked["config"], "torch_dtype": settings["dtype"]}  # instead of the Hub
    spec = replace(hub.resolve_model_from_hub(asked["model"]), parameters=asked["parameters"])
    loader.load_models()[asked["model"]] = spec
    del settings["dtype"]
    said = peer.Estimator(asked["model"], **settings).estimate_memory()
    # with its overhead, a fifth of the rest: so its own validator compares it with an allocated peak
    return dict.fromkeys(("allocated_bytes", "whole_bytes"), round(said.total_gb * GIB))


PEERS = {"vramcalc": vramcalc, "fitcheck": fitcheck, "torch-preflight": torch_preflight, "ftuneai": ftuneai}


def answer(peer: str, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        with redirect_stdout(sys.stderr):
            return dict(PEERS[peer](asked))
    except ValueError as error:  # how each of them says that it does not do this
        return {"refused": str(error)}
    except Exception as error:  # of the peer's code: it is on record
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    json.dump([answer(sys.argv[1], asked) for asked in json.load(sys.stdin)], sys.stdout)

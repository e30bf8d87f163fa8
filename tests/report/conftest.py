"""A grid of three cells, two of which have been run."""

import pytest
import yaml

from mvqkd import cli
from mvqkd.experiments.grid import GridSettings
from mvqkd.report.grids import conf_hash

ORIGIN = {"command": "./run.sh --toy", "conf_hash": "0123456789ab", "device": "cpu", "seed": 1}
ROW = {
    "name": "conformer", "distillation": "none", "streaming": False,
    "test_sets": {"test": {"wer": 25.0, "lo": 20.0, "hi": 30.0, "errors": 1, "words": 4}},
    "origin": {**ORIGIN, "date": "2024-05-31"}, "epochs": 3,
}  # fmt: skip
CONF = {
    "name": "bytes", "question": "How many?", "corpus": "toy", "seeds": [1, 2],
    "cells": {
        "none": {"confs": "distillation/none"},
        "mvq": {"confs": "distillation/mvq", "against": ["none", "mvq-n4"]},
        "mvq-n4": {"confs": "distillation/mvq", "labels": "n4"},
    },
}  # fmt: skip
DONE = {
    "student": "conformer", "labels": "mvq", "values": {}, "seeds_done": [1, 2],
    "streaming": False, "training_seconds": 100.0, "seconds_per_step": 0.25,
    "conf_hashes": ["aaaa", "bbbb"], "dates": ["2024-05-31", "2024-06-01"],
}  # fmt: skip
DIFFERENCE = {"delta": -12.5, "lo": -15.0, "hi": -9.0, "p": 0.0002}


@pytest.fixture
def grid(tmp_path) -> GridSettings:
    path = tmp_path / "egs/toy/conf/grids/bytes.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(CONF, sort_keys=False))
    return cli.parse(GridSettings, ["--config", str(path)])[0]


def of_grid(grid) -> dict:
    wer = {"wer": 25.0, "lo": 20.0, "hi": 30.0, "of_seeds": [26.0, 24.0]}
    none = {**DONE, "cell": "none", "confs": "distillation/none", "distillation": "none"}
    none |= {"test_sets": {"test": wer}, "label_bytes_per_hour": None}
    mvq = {**DONE, "cell": "mvq", "confs": "distillation/mvq", "distillation": "mvq"}
    mvq |= {"test_sets": {"test": {**wer, "wer": 12.5, "difference": DIFFERENCE}}}
    mvq["test_sets"]["test"]["against"] = {"none": {**DIFFERENCE, "delta": -12.25, "num_seeds": 1}}
    mvq |= {"label_bytes_per_hour": 1.9e6}
    missing = {"cell": "mvq-n4", "confs": "distillation/mvq", "labels": "n4", "values": {}}
    origin = {**ORIGIN, "command": "local/experiment.py", "conf_hash": conf_hash(grid)}
    cells = [none, mvq, {**missing, "seeds_done": []}]
    return {"students": [ROW], "grid": {"name": "bytes", "cells": cells, "origin": origin}}

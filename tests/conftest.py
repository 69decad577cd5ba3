"""Shared by all tests: one thread (as the trainer uses for tiny models), golden regeneration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="write golden files anew instead of comparing; read the diff afterwards",
    )


def pytest_configure(config):
    import torch

    torch.set_num_threads(1)  # two spinning threads make tiny models ten times slower
    if config.getoption("--regenerate"):
        os.environ["OPDSL_UPDATE_GOLDEN"] = "1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Settings that bind a tiny student and teacher on the task `chain`."""
    from support.models import tiny

    root = tmp_path_factory.mktemp("models")
    return {
        "student": tiny(root / "student", 0),
        "teachers": {"T": tiny(root / "teacher", 1)},
        "task": "chain",
    }

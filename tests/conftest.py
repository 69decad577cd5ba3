"""Shared by all tests: one thread (as the trainer uses for tiny models), golden regeneration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
    if config.getoption("--regenerate"):
        os.environ["OPDSL_UPDATE_GOLDEN"] = "1"

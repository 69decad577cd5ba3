"""Liger's Triton kernels on the CPU: a process of its own, in which Triton interprets.

Triton decides when a kernel is defined, so the variable must be set before Liger is imported. The
plain KL and TVD kernels do not run this way in Triton 3.9: they call a method on a scalar that is a
Python float there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np


def run(kernel: str, student: np.ndarray, teacher: np.ndarray, labels: np.ndarray):
    """(loss, its gradient with respect to the student's logits [N, V]); float32."""
    found = _all(*(x.tobytes() for x in (student, teacher, labels)), student.shape)
    return found[f"{kernel}_loss"], found[f"{kernel}_gradient"]


@lru_cache(maxsize=8)
def _all(student: bytes, teacher: bytes, labels: bytes, shape: tuple[int, int]) -> dict:
    """Every kernel on one batch: starting the process takes longer than they do."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(
            given,
            student=np.frombuffer(student).reshape(shape),
            teacher=np.frombuffer(teacher).reshape(shape),
            labels=np.frombuffer(labels, dtype=np.int64),
        )
        command = [sys.executable, __file__, str(given), str(found)]
        settings = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run(command, env=settings, check=True, capture_output=True)
        with np.load(found) as result:
            return dict(result.items())


def main(given: str, found: str) -> None:
    import torch
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    from liger_kernel.transformers.jsd import LigerJSD

    with np.load(given) as arrays:
        student, teacher = (torch.from_numpy(arrays[k]).float() for k in ("student", "teacher"))
        labels = torch.from_numpy(arrays["labels"])
    student.requires_grad_()
    head = torch.eye(student.shape[-1])
    ce, tv = LigerFusedCETVDLoss()(student, teacher, labels)
    losses = {
        "jsd": LigerJSD(beta=0.3)(student.log_softmax(-1), teacher.log_softmax(-1), labels),
        "fused_jsd": LigerFusedLinearJSD(jsd_beta=1.0)(student, head, teacher, head, labels),
        "fused_kl": LigerFusedLinearKLDivLoss()(student, head, teacher.softmax(-1), labels),
        "fused_ce_tvd": (ce + tv).sum() / (labels != -100).sum(),
    }
    arrays = {}
    for name, loss in losses.items():
        arrays[f"{name}_loss"] = loss.detach().numpy()
        arrays[f"{name}_gradient"] = torch.autograd.grad(loss, student, retain_graph=True)[
            0
        ].numpy()
    np.savez(found, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])

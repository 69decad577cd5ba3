"""opdsl: a compiler for on-policy distillation methods.

    import opdsl
    method = opdsl.load("cr_opd")          # or a path, or opdsl.compile(text)
    print(method.explain())
    batch = opdsl.Batch.from_logits(student_logits, teacher_logits, tokens=..., mask=...)
    method.loss(batch).loss.backward()

Public names load on first use, so that `opdsl check` starts without torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

_WHERE = {
    "Batch": "opdsl.emit.batch",
    "BatchError": "opdsl.emit.batch",
    "CompileError": "opdsl.diagnostics",
    "Compilation": "opdsl.compilation",
    "Head": "opdsl.emit.kernels.head",
    "LossResult": "opdsl.emit.runtime",
    "Method": "opdsl.method",
    "VocabShard": "opdsl.emit.kernels.parallel",
    "compile": "opdsl.method",
    "load": "opdsl.method",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str):
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'opdsl' has no attribute {name!r}")

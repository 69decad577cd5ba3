"""The trainer: rollouts, teachers, credit, checkpoints and the embedded task suite.

Nothing is imported here: every module below is loaded by whoever needs it, so that
`opdsl check` never pays for torch or transformers.
"""

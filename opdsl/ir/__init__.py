"""The intermediate representation: programs over the nodes of `opdsl.meaning.node`.

lower (terms -> one loss per row) -> derive (its logit cotangent in coefficient form) ->
stages (which pass computes what) -> needs, fingerprints; `interpret` is the float64 oracle.
"""

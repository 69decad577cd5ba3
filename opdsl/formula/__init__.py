"""The formula room: from the nodes of a program to mathematics.

normal (a normal form of node graphs) -> recognise (divergences by structure) -> factor and printer
(a readable layout) -> push and gradient (Δz and coefficients), sections (L(θ), definitions) ->
explain, with page (a screen of text) and paper (LaTeX, markdown). state, mass and figure show where
the mass goes at one state. `definition` explains one definition of the library, `to_sympy` checks algebra. No torch here.
"""

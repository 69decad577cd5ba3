"""The formula room: from the nodes of a program to mathematics.

normal (a normal form of node graphs) -> recognise (divergences by structure) -> factor and printer
(a readable layout) -> sections (L(θ), definitions, coefficient fields) -> explain (the page).
`definition` explains one definition of the library, `to_sympy` checks algebra. No torch here.
"""

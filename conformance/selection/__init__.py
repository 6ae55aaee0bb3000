"""Checks of the selector: a second statement of its specification, a grid of cells, and invariants over that grid.

``facts`` reads real objects into numbers, ``predicates`` and ``model`` state the specification over them, ``axes`` and
``grid`` declare the cells, ``runner`` calls a selector on them, ``invariants`` judges the answers.
"""

"""What the processes say to one another: typed structs, and nothing but structs.

Only msgspec and the standard library are imported here. ``frontend``, ``scheduler`` and ``runner``
never import one another; they meet in this package.
"""

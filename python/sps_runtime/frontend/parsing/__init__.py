"""From an answer's text to what it says: reasoning, text and tool calls, piece by piece.

Everything is a stream: a whole answer is one piece, so streams and whole answers cannot differ.
"""

"""``sps chat``: ask a server of long documents from a terminal."""
